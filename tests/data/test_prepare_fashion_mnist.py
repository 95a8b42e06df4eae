"""The tool that prepares Fashion-MNIST, on a few images of its own."""

import gzip
import importlib.util
import pathlib
import struct
from types import ModuleType

import numpy as np
import pytest

from vitcomp_jax.data import sources

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "prepare_fashion_mnist.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
  spec = importlib.util.spec_from_file_location("prepare_fashion_mnist", TOOL)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def write_idx(file: pathlib.Path, array: np.ndarray) -> None:
  header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
  file.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_files(tmp_path: pathlib.Path) -> pathlib.Path:
  rng = np.random.default_rng(0)
  for prefix, count in (("train", 40), ("t10k", 20)):
    images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
  return tmp_path


def test_prepared_set_holds_every_image(tool: ModuleType, idx_files: pathlib.Path) -> None:
  data_dir = idx_files / "tfds"
  assert tool.main(["--source", str(idx_files), "--data_dir", str(data_dir)]) == 0
  for split in ("train", "test"):
    source = sources.make_source("fashion_mnist", str(data_dir), split, (1, 1), 1)
    assert source.class_names == tool.CLASS_NAMES
    images, labels = tool.read_split(idx_files, split)
    found = {np.asarray(source[i].image).tobytes(): source[i].label for i in range(len(source))}
    want = {i.tobytes(): int(label) for i, label in zip(images, labels, strict=True)}
    assert found == want


def test_bundle_takes_the_first_of_each_class(
  tool: ModuleType, idx_files: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(tool, "BUNDLED_PER_CLASS", {"train": 2, "test": 1})
  file = idx_files / "bundle.npz"
  assert tool.main(["--source", str(idx_files), "--bundle", str(file)]) == 0
  with np.load(file) as arrays:
    for split, count in (("train", 20), ("test", 10)):
      images, labels = tool.read_split(idx_files, split)
      found = sorted(image.tobytes() for image in arrays[f"{split}_image"])
      assert found == sorted(image.tobytes() for image in images[:count])
      assert sorted(arrays[f"{split}_label"]) == sorted(labels[:count])


def test_missing_files_are_named(
  tool: ModuleType, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert tool.main(["--source", str(tmp_path)]) == 2
  message = capsys.readouterr().err
  assert "apt install dataset-fashion-mnist" in message and "t10k-labels" in message
