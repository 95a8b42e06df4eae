"""Batches in an order that the seed and the step alone decide.

Batch k of a run is a pure function of `(seed, k)`: a run that starts at step k sees exactly what an
uninterrupted one sees from there on. Images stay uint8 here; the jitted step normalises them.
"""

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import PIL.Image

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import images, labels, mixing, sources, transforms
from vitcomp_jax.data.rand_augment import rand_augment
from vitcomp_jax.errors import UserError

Batch = dict[str, np.ndarray]

_MEMORY_BYTES = 2**30  # What the decoded images of a data set may take.
_EPOCHS = 2**32  # Endless: Grain has no more orders.
_STEPS = 2**40  # Endless.
_CROPS = ("crop_flip", "rand_augment")
_SMALL_SIDE = 64  # Pixels; a larger image is decoded whenever it is needed.
_READ_AT_ONCE = 1024  # Records.


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
  """Returns a generator for one purpose and place, independent of all others."""
  return np.random.default_rng([seed, *purpose.encode(), 256, *position])


class Dataset:
  """A split of a data set, as batches.

  Attributes:
    name: Of the data set.
    split: Name of the split in the data set.
    class_names: By label, those included that do not occur; empty where there are no labels.
    num_classes: Their number.
    num_present: The number of classes that the split has, which may be fewer.
    has_labels: Whether there are labels; without, every label is -1.
    num_examples: Images that are used, corrupt ones included.
    pre: What is done to every image.
  """

  def __init__(
    self,
    source: sources.Source,
    indices: np.ndarray,
    pre: transforms.Preprocess,
    seed: int,
    augmentation: DataConfig,
    skip_corrupt: bool,
    workers: int,
    label_names: Sequence[str] = (),
  ) -> None:
    """Opens it.

    Args:
      source: The examples.
      indices: int[n], those of the source that are used.
      pre: What is done to every image.
      seed: Of the order and the augmentation.
      augmentation: What is done to training images: `augment`, `erase`, `mixup`, `cutmix` and
        `repeats` of a config.
      skip_corrupt: Whether to leave out and count corrupt images, or to stop at the first.
      workers: Threads that decode images.
      label_names: As for `loader.load`.
    """
    self.name, self.split = source.name, source.split
    self.has_labels = bool(source.class_names)
    self.class_names = tuple(label_names or source.class_names) if self.has_labels else ()
    self.num_classes, self.num_present = len(self.class_names), len(source.class_names)
    where = f"{self.name}, split {self.split}"
    self._labels = labels.match(source.class_names, self.class_names, where)
    self.num_examples, self.pre = len(indices), pre
    self._source, self._indices, self._seed = source, indices, seed
    self._augmentation, self._skip_corrupt, self._workers = augmentation, skip_corrupt, workers
    self._corrupt: set[int] = set()
    self._turned_told = pre.exif_orientation
    self._lock = threading.Lock()

  @property
  def skipped(self) -> int:
    """Returns the number of corrupt images left out so far."""
    return len(self._corrupt)

  def train_batches(
    self, batch_size: int, start_step: int = 0, rows: slice = slice(None)
  ) -> Iterator[Batch]:
    """Endless batches, each epoch in another order.

    With repeated augmentation (`DataConfig.repeats` r) an epoch still shows as many images as there
    are, but r augmentations of every r-th (Hoffer et al., 2020), which share a batch.

    Args:
      batch_size: May be larger than the data set.
      start_step: Number of the first batch.
      rows: Those of each batch that are wanted: where processes share batches, each makes its own.

    Returns:
      Iterator over `image` uint8[b h w 3], `label` int32[b] and `index` int64[b] in the source, and
      what `mixing.training_inputs` wants besides.
    """
    _check_batch_size(batch_size)
    # Grain's epochs use seed, seed + 1, ...: neighbouring seeds must not share permutations.
    seed = int(generator(self._seed, "order").integers(2**32))
    order = grain.MapDataset.range(self.num_examples).shuffle(seed).repeat(_EPOCHS)

    def make(step: int) -> Batch:
      wanted = self._shown(batch_size, step)[rows]
      positions = [int(order[int(i)]) for i in wanted]
      return self._train_batch(step, range(batch_size)[rows], positions)

    return self._iterate(grain.MapDataset.range(_STEPS).map(make), start_step)

  def _shown(self, batch_size: int, step: int) -> np.ndarray:
    """Places in the order of epochs of a batch's images, int[b]."""
    n, repeats = self.num_examples, self._augmentation.repeats
    place = step * batch_size + np.arange(batch_size)
    shown = place // n * n + place % n // repeats
    # Rows mix with their neighbours, which must not be the same image.
    return np.concatenate([shown[i::repeats] for i in range(repeats)])

  def eval_batches(self, batch_size: int, rows: slice = slice(None)) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with zeros.

    Args:
      batch_size: Of every batch, the last one too.
      rows: Those of each batch that are wanted, as in `train_batches`.

    Returns:
      Iterator over `image` uint8[b h w 3], `label` int32[b], `index` int64[b] in the source (-1:
      none) and `mask` float32[b], 1 for examples, 0 for filling and for corrupt images. At its end
      it raises a UserError if all images are corrupt.
    """
    _check_batch_size(batch_size)
    count = math.ceil(self.num_examples / batch_size)

    def make(step: int) -> Batch:
      return self._eval_batch(np.arange(step * batch_size, (step + 1) * batch_size)[rows])

    return self._with_some_readable(self._iterate(grain.MapDataset.range(count).map(make), 0))

  def sample(self, count: int) -> Batch:
    """A few images for figures, spread evenly over the set.

    Args:
      count: How many; at most all.

    Returns:
      `image` uint8[n h w 3], `label` int32[n] and `index` int64[n] in the source.
    """
    count = min(count, self.num_examples)
    positions = np.arange(count) * self.num_examples // max(count, 1)
    return _stack([self._readable(int(p)) for p in positions])

  def _with_some_readable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
    found = False
    for batch in batches:
      found = found or bool(batch["mask"].any())
      yield batch
    if not found:
      raise self._only_corrupt()

  def _iterate(self, batches: grain.MapDataset, start_step: int) -> Iterator[Batch]:
    """Makes the batches in threads, a few ahead."""
    threads = self._workers if self._memory is None else 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return _with_one_line_errors(iterator)

  def _train_batch(self, step: int, rows: range, positions: list[int]) -> Batch:
    """A batch's rows, augmented by draws of the step and the row alone."""
    config = self._augmentation
    if config.augment in _CROPS:
      rngs = [generator(self._seed, "augment", step, i) for i in rows]
      batch = _stack([self._readable(p, rng) for p, rng in zip(positions, rngs, strict=True)])
    else:
      batch = _stack([self._readable(p) for p in positions])
    if config.augment == "flip_shift":
      draws = [generator(self._seed, "augment", step, i) for i in rows]
      batch["image"] = transforms.random_flip_shift(batch["image"], draws)
    if config.erase:
      draws = [generator(self._seed, "erase", step, i) for i in rows]
      boxes = [mixing.draw_erased(self.pre.image_size, rng, config.erase) for rng in draws]
      batch["erased"] = np.array(boxes, np.int32)
    if config.mixup or config.cutmix:
      rng = generator(self._seed, "mix", step)
      share, box = mixing.draw_mix(self.pre.image_size, rng, config.mixup, config.cutmix)
      batch["mix_share"] = np.full(len(rows), share, np.float32)
      batch["mix_box"] = np.tile(np.array(box, np.int32), (len(rows), 1))
    return batch

  def _eval_batch(self, positions: np.ndarray) -> Batch:
    found = [self._item(int(p)) if p < self.num_examples else None for p in positions]
    nothing = _Item(np.zeros((*self.pre.image_size, 3), np.uint8), 0, -1)
    batch = _stack([nothing if item is None else item for item in found])
    return batch | {"mask": np.array([item is not None for item in found], np.float32)}

  def _readable(self, position: int, rng: np.random.Generator | None = None) -> "_Item":
    """The item at `position`, or the next one that is not corrupt."""
    for i in range(self.num_examples):
      if item := self._item((position + i) % self.num_examples, rng):
        return item
    raise self._only_corrupt()

  def _only_corrupt(self) -> UserError:
    return UserError(f"{self.name}, split {self.split}: expected images, got only corrupt ones.")

  def _item(self, position: int, rng: np.random.Generator | None = None) -> "_Item | None":
    """The item at `position`, augmented if there is a generator; None if it is corrupt."""
    if self._memory is not None:
      return self._memory[position]
    index = int(self._indices[position])
    return self._made(sources.read(self._source, [index])[0], index, rng)

  def _made(
    self,
    example: sources.Example | sources.CorruptImage,
    index: int,
    rng: np.random.Generator | None = None,
  ) -> "_Item | None":
    try:
      if isinstance(example, sources.CorruptImage):
        raise example
      return self._transform(example, index, rng)
    except sources.CorruptImage as error:
      self._leave_out(index, error)
      return None

  def _transform(
    self, example: sources.Example, index: int, rng: np.random.Generator | None
  ) -> "_Item":
    self._tell_turned(example.image, index)
    if rng is None:
      image = transforms.evaluation_image(example.image, self.pre)
    else:
      cropped = transforms.random_crop_flip(example.image, self.pre, rng)
      if self._augmentation.augment == "rand_augment":
        cropped = rand_augment(cropped, rng, self.pre.fill)
      image = np.asarray(cropped)
    label = self._labels[example.label] if self.has_labels else example.label
    return _Item(image, label, index)

  def _tell_turned(self, image: PIL.Image.Image | np.ndarray, index: int) -> None:
    """Warns once of images that a viewer turns, and that are taken as they are stored."""
    if self._turned_told or images.exif_turn(image) is None:
      return
    self._turned_told = True
    logging.warning(
      "%s, split %s: image %d, and maybe others, is turned by viewers as its EXIF tag says, and "
      "taken here as stored, as by timm and torchvision; config.data.exif_orientation turns it",
      self.name,
      self.split,
      index,
    )

  def _leave_out(self, index: int, error: sources.CorruptImage) -> None:
    """Counts a corrupt image, or stops."""
    if not self._skip_corrupt:
      raise UserError(
        f"Corrupt image: {error}; mend or remove it, or set config.data.on_error=skip."
      ) from error
    with self._lock:
      if index not in self._corrupt:
        self._corrupt.add(index)
        logging.warning("Left out a corrupt image: %s", error)

  @functools.cached_property
  def _memory(self) -> "list[_Item | None] | None":
    """Decodes all items once if the images are small and fit in memory; None otherwise."""
    shape, size = self._source.image_shape, self.pre.image_size
    if shape is None or max(shape) > _SMALL_SIDE or self._augmentation.augment in _CROPS:
      return None
    if self.num_examples * math.prod(size) * 3 > _MEMORY_BYTES:
      return None
    items: list[_Item | None] = []
    for start in range(0, self.num_examples, _READ_AT_ONCE):
      indices = [int(i) for i in self._indices[start : start + _READ_AT_ONCE]]
      examples = sources.read(self._source, indices)
      items += map(self._made, examples, indices)
    return items


@dataclasses.dataclass(frozen=True)
class _Item:
  image: np.ndarray  # uint8[h w 3]
  label: int
  index: int  # in the source


def _with_one_line_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
  """Yields the batches; takes what Grain appends to a message, about its frames, away again."""
  try:
    yield from batches
  except UserError as error:
    raise UserError(str(error).splitlines()[0]) from error


def _stack(items: list[_Item]) -> Batch:
  return {
    "image": np.stack([item.image for item in items]),
    "label": np.array([item.label for item in items], np.int32),
    "index": np.array([item.index for item in items], np.int64),
  }


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise UserError(f"batch_size: expected at least 1, got {batch_size}.")
