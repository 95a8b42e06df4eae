"""What a fine-tuning changes, and what it learns from."""

import numpy as np
import PIL.Image
import pytest
from flax import traverse_util

import vitcomp_jax as vc
from tests.tiny_config import get_config
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.plans import save_plan
from vitcomp_jax.weights.loading import load_params


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setitem(VARIANTS, TINY, tiny_spec())
  config = get_config()
  config.stages, config.budget.fraction = ("finetune",), None
  config.finetune.epochs, config.finetune.ema = 0.1, None
  return config


def test_norms_and_biases_alone_are_trained(config, tmp_path, optax_promotion):
  config.finetune.trains = "norms"
  config.distill.kind, config.distill.weight = "features", 1.0
  config.model.plan = str(tmp_path / "plan.json")
  model, _ = vc.load(TINY)
  save_plan(vc.uniform(model, macs=0.9), tmp_path / "plan.json")
  vc.run_stage("finetune", config, tmp_path / "run")
  spec = tiny_spec()
  before = load_params(spec, spec.dense_layers, None, config.seed)
  trained = str(tmp_path / "run/finetuned.safetensors")
  after = traverse_util.flatten_dict(load_params(spec, spec.dense_layers, trained))
  for path, values in traverse_util.flatten_dict(before).items():
    is_small = path[-1] == "bias" or any("norm" in name for name in path)
    has_changed = not np.array_equal(values, after[path])
    # The classifier's bias is behind the features.
    assert has_changed == (is_small and path[0] != "head"), path


@pytest.mark.parametrize(("kind", "weight"), [("features", 0.5), ("none", 1.0)])
def test_labels_are_needed_unless_the_dense_model_teaches_alone(kind, weight, config, tmp_path):
  config.distill.kind, config.distill.weight = kind, weight
  photos = tmp_path / "photos"
  photos.mkdir()
  for i in range(32):
    PIL.Image.new("RGB", (30, 30), (i, i, i)).save(photos / f"{i}.png")
  config.data.name, config.data.dir, config.data.pad = "folder", str(photos), 0
  config.data.divide, config.data.labels = True, "auto"
  config.data.train_examples = config.data.eval_examples = None
  with pytest.raises(UserError, match="expected labels"):
    vc.run_stage("finetune", config, tmp_path / "run")
