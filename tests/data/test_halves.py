"""A folder without splits is divided, and labels can be left out."""

import numpy as np
import PIL.Image
import pytest

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import halves, loader
from vitcomp_jax.errors import UserError


def _images(folder, count, first=0):
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(first, first + count):
    PIL.Image.new("RGB", (4, 4), (i, i, i)).save(folder / f"{i}.png")


def _open(folder, split):
  config = DataConfig(name="folder", dir=str(folder), divide=True)
  return loader.open_source(config, split)


def _grays(source):
  return sorted(int(np.asarray(source[i].image)[0, 0, 0]) for i in range(len(source)))


@pytest.mark.parametrize("inside", ["", "val"])
def test_the_halves_hold_every_image_once(inside, tmp_path):
  _images(tmp_path / inside / "cat", 4)
  _images(tmp_path / inside / "dog", 3, first=4)
  train, evaluation = _open(tmp_path, "train"), _open(tmp_path, "eval")
  assert (len(train), len(evaluation)) == (4, 3)
  assert sorted(_grays(train) + _grays(evaluation)) == list(range(7))
  assert train.class_names == evaluation.class_names == ("cat", "dog")
  assert _grays(_open(tmp_path, "train")) == _grays(train)


def test_splits_that_are_there_are_taken(tmp_path):
  _images(tmp_path / "train" / "cat", 3)
  _images(tmp_path / "val" / "cat", 2, first=3)
  assert _grays(_open(tmp_path, "train")) == [0, 1, 2]
  assert _grays(_open(tmp_path, "eval")) == [3, 4]


def test_a_class_may_be_called_like_a_split(tmp_path):
  _images(tmp_path / "train", 2)
  _images(tmp_path / "plane", 2, first=2)
  train, evaluation = _open(tmp_path, "train"), _open(tmp_path, "eval")
  assert train.class_names == ("plane", "train")
  assert sorted(_grays(train) + _grays(evaluation)) == [0, 1, 2, 3]


def test_splits_that_are_named_are_taken(tmp_path):
  _images(tmp_path / "train" / "cat", 2)
  _images(tmp_path / "mine" / "cat", 2, first=2)
  config = DataConfig(name="folder", dir=str(tmp_path), divide=True, eval_split="mine")
  assert _grays(loader.open_source(config, "train")) == [0, 1]
  assert _grays(loader.open_source(config, "eval")) == [2, 3]


def test_images_without_classes_are_divided_too(tmp_path):
  _images(tmp_path, 5)
  train = _open(tmp_path, "train")
  assert len(train) == 3 and train.class_names == () and train[0].label == -1


def test_labels_are_left_out(tmp_path):
  _images(tmp_path / "cat", 2)
  source = halves.Unlabelled(_open(tmp_path, "train"))
  assert source.class_names == () and source[0].label == -1 and len(source) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(count, tmp_path):
  _images(tmp_path / "cat", count)
  with pytest.raises(UserError, match="expected"):
    _open(tmp_path, "train")
  with pytest.raises(UserError, match="config.data.dir: expected a folder with images"):
    _open(tmp_path / "nowhere", "train")
