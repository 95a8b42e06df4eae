"""The whole job from the command line: weights and a folder of images in, one table out."""

import json
import pathlib
import shutil

import PIL.Image
import pytest

from vitcomp_jax import main
from vitcomp_jax.data import sources
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.weights import loading

MINI = "vit_mini_patch3_30"
QUICK = (
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
def given(tmp_path):
  """Weights that say what they are, and a folder for images."""
  spec = get_spec(MINI)
  weights = tmp_path / "mine.safetensors"
  shutil.copy(loading.bundled_weights(spec), weights)
  return weights, tmp_path / "photos"


def _photos(folder, by_class, count=20):
  source = sources.make_source("bundled", None, "test", (1, 1), 0)
  for i in range(count):
    example = source[i]
    inner = folder / source.class_names[example.label] if by_class else folder
    inner.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(example.image.squeeze()).save(inner / f"{i}.png")


def _compress(weights, photos, workdir):
  options = [f"--config.model.weights={weights}", f"--config.data.dir={photos}"]
  command = ["main", "--config", "compress", "--workdir", str(workdir), *options, *QUICK]
  assert main.main(command) == 0
  return json.loads((workdir / "result.json").read_text())["rows"]


@pytest.mark.parametrize(
  "by_class", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["photos", "classes"]
)
def test_a_checkpoint_and_a_folder(by_class, given, tmp_path, capsys, optax_promotion):
  weights, photos = given
  _photos(photos, by_class)
  workdir = tmp_path / "run"
  dense, small = _compress(weights, photos, workdir)
  assert (dense["name"], small["name"]) == ("dense", "diffrate")
  measured = "top1" if by_class else "logit_divergence"
  assert measured in dense and measured in small
  assert small["gmacs"] / dense["gmacs"] == pytest.approx(0.65, abs=0.01)
  assert small["images_per_second"]["1"] > 0
  manifest = json.loads((workdir / "export/manifest.json").read_text())
  assert [each["format"] for each in manifest["artefacts"]] == ["stablehlo"]
  printed = capsys.readouterr().out
  assert "| dense " in printed and "| diffrate" in printed and "images/s, batch 1" in printed


def test_weights_that_do_not_say_what_they_are(given, capsys):
  weights, photos = given
  _photos(photos, by_class=False, count=2)
  unnamed = weights.with_name("augreg.npz")
  shutil.copy(pathlib.Path(__file__).with_name("weights") / "augreg_google.npz", unnamed)
  command = ["main", "--config", "compress", f"--config.model.weights={unnamed}"]
  assert main.main([*command, f"--config.data.dir={photos}"]) == 2
  assert "config.model.variant" in capsys.readouterr().err
  assert main.main(["main", "--config", "compress", f"--config.data.dir={photos}"]) == 2
  assert "config.model.weights: expected a file or a hub id" in capsys.readouterr().err
