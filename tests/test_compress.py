"""The whole job from the command line: weights and a folder of images in, one table out."""

import dataclasses
import json
import pathlib
import shutil

import PIL.Image
import pytest

import vitcomp_jax as vc
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax import main
from vitcomp_jax.config import default_config, from_config_dict
from vitcomp_jax.data import sources
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.runs.run import make_run
from vitcomp_jax.weights import loading

QUICK = (
  "--config.budget.fraction=0.65",
  "--config.compilation_cache=none",
  "--config.search.steps=2",
  "--config.search.batch_size=8",
  "--config.search.choose_images=8",
  "--config.evaluate.batch_size=10",
  "--config.evaluate.token_maps=0",
  "--config.benchmark.batch_sizes=(1,)",
  "--config.benchmark.seconds=0.1",
  "--config.benchmark.rounds=1",
)


@pytest.fixture
def given(tmp_path, monkeypatch):
  """Weights that say what they are, and a folder for images."""
  monkeypatch.setitem(VARIANTS, TINY, tiny_spec())
  model, params = vc.load(TINY)
  names = _class_names(sources.make_source("bundled", None, "test", (1, 1), 0))
  weights = tmp_path / "mine.safetensors"
  loading.save_params(dataclasses.replace(model.spec, class_names=names), params, weights)
  return weights, tmp_path / "photos"


def _class_names(source):
  """A folder's name holds no slash."""
  return tuple(name.replace("/", " or ") for name in source.class_names)


def _photos(folder, by_class, count=20, other=None):
  """Writes photos; a class of the name `other` is none of the model's."""
  source = sources.make_source("bundled", None, "test", (1, 1), 0)
  for i in range(count):
    example = source[i]
    name = other if other and i == count - 1 else _class_names(source)[example.label]
    inner = folder / name if by_class else folder
    inner.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(example.image.squeeze()).save(inner / f"{i}.png")


def _compress(weights, photos, workdir):
  options = [f"--config.model.weights={weights}", f"--config.data.dir={photos}"]
  command = ["main", "--config", "compress", "--workdir", str(workdir), *options, *QUICK]
  assert main.main(command) == 0
  return json.loads((workdir / "result.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("by_class", "other"),
  [(False, None), (True, None), (True, "Hat")],
  ids=["photos", "classes", "other_classes"],
)
def test_a_checkpoint_and_a_folder(by_class, other, given, tmp_path, capsys, optax_promotion):
  weights, photos = given
  _photos(photos, by_class, other=other)
  workdir = tmp_path / "run"
  dense, small = _compress(weights, photos, workdir)
  assert (dense["name"], small["name"]) == ("dense", "diffrate")
  measured = "top1" if by_class and not other else "logit_divergence"
  assert measured in dense and measured in small
  assert ("cosine" in small) == (measured != "top1")
  assert json.loads((workdir / "config.json").read_text())["leaves_labels_out"] == bool(other)
  assert small["gmacs"] / dense["gmacs"] == pytest.approx(0.65, abs=0.01)
  assert small["images_per_second"]["1"] > 0
  manifest = json.loads((workdir / "export/manifest.json").read_text())
  assert [each["format"] for each in manifest["artefacts"]] == ["stablehlo"]
  printed = capsys.readouterr().out
  assert "| dense " in printed and "| diffrate" in printed and "images/s, batch 1" in printed


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_of_either_split_may_not_be_the_models(split, given):
  weights, photos = given
  for name in ("train", "val"):
    _photos(photos / name, by_class=True, count=3, other="Hat" if name == split else None)
  config = default_config()
  config.model.weights, config.model.variant = str(weights), None
  config.data.name, config.data.dir = "folder", str(photos)
  config.stages = ("search", "evaluate")
  with pytest.raises(UserError, match="expected classes among the model's 10"):
    run = make_run(from_config_dict(config), photos.parent / "run")
    assert run.inputs.train_data and run.inputs.eval_data
  config.data.labels = "auto"
  inputs = make_run(from_config_dict(config), photos.parent / "run").inputs
  assert inputs.leaves_labels_out
  assert not inputs.train_data.has_labels and not inputs.eval_data.has_labels


def test_labels_do_not_come_or_go_while_a_run_is_under_way(given, tmp_path):
  weights, photos = given
  _photos(photos, by_class=True, count=4, other="Hat")
  config = default_config()
  config.model.weights, config.model.variant = str(weights), None
  config.data.name, config.data.dir, config.data.labels = "folder", str(photos), "auto"
  config.data.divide = True
  run = make_run(from_config_dict(config), tmp_path / "run")
  run.workdir.begin(run.config, run.inputs.class_names, run.inputs.leaves_labels_out)
  (photos / "Hat").rename(photos / "Bag")
  run = make_run(from_config_dict(config), tmp_path / "run")
  with pytest.raises(UserError, match="was begun without labels"):
    run.workdir.begin(run.config, run.inputs.class_names, run.inputs.leaves_labels_out)


def test_weights_that_do_not_say_what_they_are(given, capsys):
  weights, photos = given
  _photos(photos, by_class=False, count=2)
  unnamed = weights.with_name("augreg.npz")
  shutil.copy(pathlib.Path(__file__).with_name("weights") / "augreg_google.npz", unnamed)
  command = ["main", "--config", "compress", f"--config.model.weights={unnamed}"]
  assert main.main([*command, f"--config.data.dir={photos}"]) == 2
  assert "config.model.variant" in capsys.readouterr().err
  assert main.main(["main", "--config", "compress", f"--config.data.dir={photos}"]) == 2
  assert "weights W are not there" in capsys.readouterr().err
