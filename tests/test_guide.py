"""Every command and program of docs/guide.md, in its order, on small images and a small model."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest

from tests.test_main import BUNDLED, ROOT
from vitcomp_jax.data import sources
from vitcomp_jax.data.transforms import CROP_MODES, Preprocess, evaluation_image

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# All that is changed: the guide's experiment in small. It stands behind the guide's own mine.py.
SMALL = """
_whole = get_config


def get_config():
  config = _whole()
  config.compilation_cache = "{cache}"
  config.search.steps, config.search.batch_size, config.search.choose_images = 3, 8, 8
  for training in (config.pretrain, config.finetune):
    training.epochs, training.batch_size, training.warmup_epochs = 1.0, 20, 0.0
  config.evaluate.batch_size = 20
  config.benchmark.batch_sizes, config.benchmark.seconds, config.benchmark.rounds = (1,), 0.1, 1
  return config
"""


def _images(folder: pathlib.Path) -> None:
  """A few of the bundled images, in folders of classes."""
  for split, of, count in (("train", "train", 4), ("val", "test", 2)):
    source = sources.make_source("bundled", None, of, (1, 1), 0)
    left = dict.fromkeys(range(10), count)
    for i in range(len(source)):
      example = source[i]
      if left[example.label]:
        left[example.label] -= 1
        file = folder / split / str(example.label) / f"{left[example.label]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.squeeze(example.image)).save(file)
    assert not any(left.values())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_the_served_model_sees_what_the_library_does(crop_mode, interpolation, tmp_path):
  pre = Preprocess(
    *((32, 32), (0.485, 0.456, 0.406), (0.2,) * 3, 0.875, interpolation, 0, crop_mode, True)
  )
  read = _serve(pre)
  rng = np.random.default_rng(0)
  exif = PIL.Image.Exif()
  for i, shape in enumerate(
    [(30, 40), (99, 61), (32, 32), (1, 9), (200, 7), (3, 20000), (20000, 1)]
  ):
    exif[PIL.ExifTags.Base.Orientation] = i + 1
    file = tmp_path / f"{i}.png"
    image = PIL.Image.fromarray(rng.integers(100, 156, size=(*shape, 3), dtype=np.uint8))
    image.save(file, exif=exif)
    with PIL.Image.open(file) as image:
      want = evaluation_image(image, pre).astype(int)
    off = np.abs(read(file) - want)
    assert off.max() <= 2 and off.mean() < 0.3, shape


def test_the_served_model_sees_16_bits_and_refuses_more(tmp_path):
  read = _serve(Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic"))
  pixels = np.random.default_rng(0).integers(2**16, size=(8, 8), dtype=np.uint16)
  PIL.Image.fromarray(pixels).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(read(tmp_path / "deep.png")[:, :, 0], pixels >> 8)
  for mode in ("I", "F"):
    PIL.Image.new(mode, (9, 9)).save(tmp_path / "deep.tif")
    with pytest.raises(SystemExit, match=rf"deep.tif: mode {mode} has 32 bits"):
      read(tmp_path / "deep.tif")


def _serve(pre):
  """The guide's function that reads an image for the served model."""
  blocks = BLOCK.findall((ROOT / "docs" / "guide.md").read_text())
  (text,) = [text for _, text in blocks if text.startswith("# serve.py")]
  begin, functions = text.index("side = "), text[: text.index("for path in sys.argv")]
  names = {"np": np, "PIL": PIL, "sys": sys, "preprocess": dataclasses.asdict(pre)}
  exec(functions[begin:], names)
  return names["read"]


@pytest.mark.slow
def test_the_guide(tmp_path):
  _images(tmp_path / "data")
  shutil.copy(BUNDLED, tmp_path / "mine.safetensors")
  environment = {
    **os.environ,
    "DATA": "data",
    "WEIGHTS": "mine.safetensors",
    "VARIANT": "vit_mini_patch3_30",
    "IMAGE": "data/val/9/0.png",
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
  }
  said = []
  for language, text in BLOCK.findall((ROOT / "docs" / "guide.md").read_text()):
    if language == "python":
      name = text.splitlines()[0].removeprefix("# ")
      more = SMALL.format(cache=ROOT / ".pytest_cache" / "xla") if name == "mine.py" else ""
      (tmp_path / name).write_text(text + more)
      continue
    result = subprocess.run(
      ["bash", "-euo", "pipefail", "-c", text],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
    assert result.returncode == 0, f"{text}\n{result.stderr}"
    said.append(result.stdout)
  runs = tmp_path / "runs"
  assert {run.name for run in runs.iterdir()} == {
    *("dense", "mine", "compare", "tuned", "deployed", "pretrained", "shallow")
  }
  rows = json.loads((runs / "compare" / "result.json").read_text())["rows"]
  assert [row["name"].split("@")[0] for row in rows][2:] == ["tome", "evit", "uniform_merge"]
  assert (runs / "shallow" / "export" / "model.stablehlo").exists()
  assert (tmp_path / "features.png").exists() and list((tmp_path / "maps").iterdir())
  # The run, its export, and the program that knows JAX alone say the same.
  by_run, by_export = re.findall(r"^data.*\n +[\d.]+ %  (.*)$", "".join(said), re.MULTILINE)
  served = re.search(r"^data/val/9/0.png (.*)$", "".join(said), re.MULTILINE)
  assert served and by_run == by_export == served[1]
