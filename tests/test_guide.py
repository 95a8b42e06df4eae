"""Every command and program of docs/guide.md, in its order, on small images and a small model."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.test_main import BUNDLED, ROOT
from vitcomp_jax.data import sources

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
