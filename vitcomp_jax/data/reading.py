"""Reads examples, transforms their images to the model's input size, and skips corrupt ones."""

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Sequence

import numpy as np
import PIL.Image

from vitcomp_jax.data import images, sources, transforms
from vitcomp_jax.data.rand_augment import rand_augment
from vitcomp_jax.errors import UserError

CROPS = ("crop_flip", "rand_augment")  # augmentations that start from the original image
_MEMORY_BYTES = 2**30  # maximum memory for the decoded images of a data set
_SMALL_SIDE = 64  # pixels; larger images are decoded each time they are needed
_READ_AT_ONCE = 1024  # records


@dataclasses.dataclass(frozen=True)
class Item:
  """An example that is ready to be batched.

  Attributes:
    image: The image, uint8[h w 3].
    label: Index of the model's output for its class; -1 without labels.
    index: Index of the example in the source.
  """

  image: np.ndarray
  label: int
  index: int


class Reader:
  """Reads the examples of a data set by position, from any thread.

  Small images are decoded once and kept in memory.

  Attributes:
    source: The examples.
    indices: Indices of the examples to use, int[n].
  """

  def __init__(
    self,
    source: sources.Source,
    indices: np.ndarray,
    labels: Sequence[int],
    pre: transforms.Preprocess,
    augment: str,
    skip_corrupt: bool,
  ) -> None:
    """Stores the arguments; nothing is read yet.

    Args:
      source: The examples.
      indices: Indices of the examples to use, int[n].
      labels: Index of the model's output for each class of the source; empty without labels.
      pre: Preprocessing of the images.
      augment: Augmentation of training images, one of `transforms.AUGMENTS`.
      skip_corrupt: Whether corrupt images are skipped and counted rather than raise an error.
    """
    self.source, self.indices = source, indices
    self._labels, self._pre, self._augment = labels, pre, augment
    self._skip_corrupt = skip_corrupt
    self._corrupt: set[int] = set()
    self._turned_told = pre.exif_orientation
    self._lock = threading.Lock()

  @property
  def skipped(self) -> int:
    """Returns the number of corrupt images skipped so far."""
    return len(self._corrupt)

  def item(self, position: int, rng: np.random.Generator | None = None) -> Item | None:
    """Reads one example.

    Args:
      position: Position of the example in `indices`.
      rng: Random generator of the crop; None for the evaluation transform.

    Returns:
      The example; None if its image is corrupt.

    Raises:
      UserError: If its image is corrupt and corrupt images are not skipped.
    """
    if self.memory is not None:
      return self.memory[position]
    index = int(self.indices[position])
    return self._made(sources.read(self.source, [index])[0], index, rng)

  def readable(self, position: int, rng: np.random.Generator | None = None) -> Item:
    """Reads one example, or the next one whose image is not corrupt.

    Args:
      position: Position of the example in `indices`.
      rng: Random generator of the crop; None for the evaluation transform.

    Raises:
      UserError: If all images are corrupt, or corrupt images are not skipped.
    """
    for i in range(len(self.indices)):
      if item := self.item((position + i) % len(self.indices), rng):
        return item
    raise self.only_corrupt()

  def only_corrupt(self) -> UserError:
    """Returns the error for a split whose images are all corrupt."""
    name, split = self.source.name, self.source.split
    return UserError(f"{name}, split {split}: expected images, got only corrupt ones.")

  @functools.cached_property
  def memory(self) -> list[Item | None] | None:
    """Decodes and returns all examples if the images are small and fit in memory, or else None."""
    shape, size = self.source.image_shape, self._pre.image_size
    if shape is None or max(shape) > _SMALL_SIDE or self._augment in CROPS:
      return None
    if len(self.indices) * math.prod(size) * 3 > _MEMORY_BYTES:
      return None
    items: list[Item | None] = []
    for start in range(0, len(self.indices), _READ_AT_ONCE):
      indices = [int(i) for i in self.indices[start : start + _READ_AT_ONCE]]
      examples = sources.read(self.source, indices)
      items += map(self._made, examples, indices)
    return items

  def _made(
    self,
    example: sources.Example | sources.CorruptImage,
    index: int,
    rng: np.random.Generator | None = None,
  ) -> Item | None:
    try:
      if isinstance(example, sources.CorruptImage):
        raise example
      image = self._transformed(example.image, index, rng)
    except sources.CorruptImage as error:
      self._skip(index, error)
      return None
    label = self._labels[example.label] if self._labels else example.label
    return Item(image, label, index)

  def _transformed(
    self, image: PIL.Image.Image | np.ndarray, index: int, rng: np.random.Generator | None
  ) -> np.ndarray:
    self._warn_turned(image, index)
    if rng is None:
      return transforms.evaluation_image(image, self._pre)
    cropped = transforms.random_crop_flip(image, self._pre, rng)
    if self._augment == "rand_augment":
      cropped = rand_augment(cropped, rng, self._pre.fill)
    return np.asarray(cropped)

  def _warn_turned(self, image: PIL.Image.Image | np.ndarray, index: int) -> None:
    """Warns once about images that viewers rotate but this library reads as stored."""
    if self._turned_told or images.exif_turn(image) is None:
      return
    self._turned_told = True
    logging.warning(
      "%s, split %s: image %d, and maybe others, is turned by viewers as its EXIF tag says, and "
      "taken here as stored, as by timm and torchvision; config.data.exif_orientation turns it",
      self.source.name,
      self.source.split,
      index,
    )

  def _skip(self, index: int, error: sources.CorruptImage) -> None:
    """Counts a corrupt image, or raises an error if corrupt images are not to be skipped."""
    if not self._skip_corrupt:
      raise UserError(
        f"Corrupt image: {error}; mend or remove it, or set config.data.on_error=skip."
      ) from error
    with self._lock:
      if index not in self._corrupt:
        self._corrupt.add(index)
        logging.warning("Left out a corrupt image: %s", error)
