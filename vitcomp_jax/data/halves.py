"""Splits a folder of images that has no splits of its own, and drops the labels of a source."""

import logging
import os

import numpy as np

from vitcomp_jax import paths
from vitcomp_jax.data.sources import EVAL_SPLITS, Example, FolderSource, Source
from vitcomp_jax.errors import UserError


class Half:
  """A random half of a folder's images, which is the same every time."""

  def __init__(self, whole: FolderSource, split: str) -> None:
    """Draws the images.

    Args:
      whole: The folder.
      split: `train` for one half, any other name for the other half.
    """
    order = np.random.default_rng(0).permutation(len(whole))
    middle = (len(whole) + 1) // 2
    chosen = order[:middle] if split == "train" else order[middle:]
    self._whole, self._indices = whole, np.sort(chosen)
    self.name, self.split, self.class_names = whole.name, split, whole.class_names
    self.image_shape = whole.image_shape

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    return self._whole[int(self._indices[index])]


class Unlabelled:
  """The images of a source, without their labels."""

  def __init__(self, source: Source) -> None:
    self._source = source
    self.name, self.split, self.class_names = source.name, source.split, ()
    self.image_shape = source.image_shape

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    return Example(self._source[index].image, -1)


def has_splits(directory: str | None) -> bool:
  """Returns whether a folder has both a training and an evaluation split."""
  path = _checked(directory)
  try:
    names = set(os.listdir(path))
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
  return "train" in names and bool(names & set(EVAL_SPLITS))


def half(directory: str | None, split: str, class_order: str) -> Half:
  """Opens one half of the images in a folder, or in the folder's only split.

  Args:
    directory: The folder.
    split: `train` or `eval`.
    class_order: Order of the classes, see `labels.sort_classes`.

  Raises:
    UserError: If the folder does not exist or has fewer than two images.
  """
  path = _checked(directory)
  inner = [entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != "."]
  is_split = len(inner) == 1 and inner[0] in ("train", *EVAL_SPLITS)
  whole = FolderSource(path, inner[0] if is_split else ".", class_order)
  if len(whole) < 2:
    raise UserError(f"{path}: expected two images at least, one to evaluate on, got {len(whole)}.")
  found = Half(whole, split)
  what = "to search and train on" if split == "train" else "to evaluate on"
  logging.info(
    "%s: no second split: %d of its %d images are %s", path, len(found), len(whole), what
  )
  return found


def _checked(directory: str | None) -> str:
  path = "" if directory is None else paths.expand(directory)
  if not os.path.isdir(path):
    raise UserError(f"config.data.dir: expected a folder with images, got {directory!r}.")
  return path
