"""Every config makes a valid `Config` of a variant that exists, and runs on a shrunken model."""

import dataclasses
import importlib
import pathlib

import pytest

from vitcomp_jax import configs
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.configs import compare_fashion_mnist, compare_imagenet, compare_photos
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.variants import VARIANTS, get_spec
from vitcomp_jax.plans import make_plan, save_plan
from vitcomp_jax.stages import STAGES, run_stages

FOLDER = pathlib.Path(configs.__path__[0])
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config(name):
  module = importlib.import_module(f"vitcomp_jax.configs.{name}")
  config = from_config_dict(module.get_config())
  assert config.model.variant is None or get_spec(config.model.variant)
  assert f"configs/{name}.py" in module.__doc__ or f"--config {name} " in module.__doc__


@pytest.mark.parametrize("part", compare_fashion_mnist.PARTS)
def test_a_part_of_the_comparison(part):
  config = from_config_dict(compare_fashion_mnist.get_config(part))
  assert bool(config.compare.finetuned) == (part == "finetuned")
  assert bool(config.compare.random_schedules) == (part == "random")


@pytest.mark.parametrize("model", compare_imagenet.MODELS)
def test_a_model_of_the_comparison(model):
  config = from_config_dict(compare_imagenet.get_config(model))
  assert len(config.compare.plans) == len(config.compare.budgets) >= 3


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("compare_")])
def test_an_unknown_part(name):
  module = importlib.import_module(f"vitcomp_jax.configs.{name}")
  with pytest.raises(UserError, match="behind the colon, got nothing"):
    module.get_config("nothing")


def _shrink_model(config, monkeypatch, tmp_path):
  """Three narrow layers on sixteen patches, under the same name; a plan of the same kind."""
  config.model.variant = name = config.model.variant or "deit_tiny_patch16_224"
  spec = VARIANTS[name]
  small = dict(
    image_size=(16, 16), patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32, num_classes=10
  )
  monkeypatch.setitem(VARIANTS, name, dataclasses.replace(spec, **small))
  config.model.weights = None
  spec = get_spec(name)
  reduce = PruneMerge(spec.num_tokens - 2, spec.num_tokens - 4)
  layers = tuple(dataclasses.replace(layer, reduce=reduce) for layer in spec.dense_layers)
  path = str(tmp_path / "plan.json")
  save_plan(make_plan(spec, layers, {"method": "diffrate"}), pathlib.Path(path))
  config.model.plan = path if config.model.plan else None
  config.compare.plans = (path,) * len(config.compare.plans)


def _shorten(config):
  """One step of everything, on generated images."""
  config.data.name, config.data.train_split, config.data.eval_split = "fake", "train", None
  config.data.train_examples, config.data.eval_examples, config.data.workers = 8, 4, 1
  for training in (config.pretrain, config.slim, config.finetune):
    training.epochs, training.batch_size = 0.5, 4
  config.search.steps, config.search.batch_size, config.search.choose_images = 1, 4, 4
  config.search.epoch_steps, config.search.granularity = None, 1
  config.slim.min_units = 1
  if config.budget.fractions:
    config.budget.fractions, config.search.steps = (0.9, 0.8), 2  # one step for each
  else:
    config.budget.gmacs, config.budget.fraction = None, 0.8
  config.evaluate.batch_size, config.evaluate.token_maps = 4, 1
  config.visualize.images = 1
  config.benchmark.seconds, config.benchmark.rounds = 0.1, 1
  compare = config.compare
  compare.budgets = (0.8,) if compare.budgets else ()
  compare.finetune_budgets = (0.8,)
  compare.searched, compare.seeds, compare.random_examples = None, 1, 4
  compare.random_schedules = min(2, compare.random_schedules)
  # An ablation's data and steps are not a shrunken config's.
  compare.methods = tuple(m for m in compare.methods if "=" not in m or "importance" in m)


PARTS = [(name, None) for name in NAMES if not name.startswith("compare")]
PARTS += [("compare_fashion_mnist", part) for part in compare_fashion_mnist.PARTS]
PARTS += [("compare_photos", part) for part in compare_photos.PARTS]
PARTS += [("compare_imagenet", model) for model in compare_imagenet.MODELS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_config_runs(name, part, monkeypatch, tmp_path, optax_promotion):
  module = importlib.import_module(f"vitcomp_jax.configs.{name}")
  config = module.get_config(part) if part else module.get_config()
  _shrink_model(config, monkeypatch, tmp_path)
  _shorten(config)
  config = from_config_dict(config)
  run = run_stages(config, tmp_path / "run", config.stages)
  assert all(run.workdir.is_finished(stage) for stage in config.stages)
  measured = [stage for stage in config.stages if stage not in ("visualize", "export")][-1]
  assert STAGES[measured].made(run)["entries" if measured == "benchmark" else "rows"]
