"""Batches of images and labels for training and evaluation.

Images stay uint8 here; the jitted step normalises them.
"""

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import labels, mixing, sources, transforms
from vitcomp_jax.data.reading import CROPS, Item, Reader
from vitcomp_jax.data.sampling import TrainOrder, generator
from vitcomp_jax.errors import UserError

Batch = dict[str, np.ndarray]

_STEPS = 2**40  # Endless.


class Dataset:
  """Reads one split of a data set as batches.

  Attributes:
    name: Name of the data set.
    split: Name of the split in the data set.
    class_names: Class names by label, including classes without an example; empty without labels.
    num_classes: Number of class names.
    num_present: Number of classes in the split, which may be smaller than `num_classes`.
    has_labels: Whether there are labels; without them, every label is -1.
    num_examples: Number of images, including corrupt ones.
    pre: Preprocessing of the images.
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
    """Matches the labels; no image is read yet.

    Args:
      source: The examples.
      indices: Indices of the examples to use, int[n].
      pre: Preprocessing of the images.
      seed: Seed of the order and the augmentation.
      augmentation: Augmentation of training images, in its fields `augment`, `erase`, `mixup`,
        `cutmix` and `repeats`.
      skip_corrupt: Whether corrupt images are skipped and counted rather than raise an error.
      workers: Number of threads that decode images.
      label_names: As for `loader.load`.

    Raises:
      UserError: If a class is not among `label_names`.
    """
    self.name, self.split = source.name, source.split
    self.has_labels = bool(source.class_names)
    self.class_names = tuple(label_names or source.class_names) if self.has_labels else ()
    self.num_classes, self.num_present = len(self.class_names), len(source.class_names)
    where = f"{self.name}, split {self.split}"
    outputs = labels.match(source.class_names, self.class_names, where)
    self.num_examples, self.pre = len(indices), pre
    self._seed, self._augmentation, self._workers = seed, augmentation, workers
    self._reader = Reader(source, indices, outputs, pre, augmentation.augment, skip_corrupt)

  @property
  def skipped(self) -> int:
    """Returns the number of corrupt images skipped so far."""
    return self._reader.skipped

  def train_batches(
    self, batch_size: int, start_step: int = 0, rows: slice = slice(None)
  ) -> Iterator[Batch]:
    """Returns endless batches, in a new order every epoch; see `sampling.TrainOrder`.

    Args:
      batch_size: Size of the whole batch; may be larger than the data set.
      start_step: Number of the first batch.
      rows: Rows of each batch to make; processes that share a batch make different rows.

    Returns:
      An iterator over `image` uint8[b h w 3], `label` int32[b], `index` int64[b] in the source, and
      the random draws that `mixing.training_inputs` needs.
    """
    _check_batch_size(batch_size)
    order = TrainOrder(self.num_examples, self._augmentation.repeats, self._seed)

    def make(step: int) -> Batch:
      examples = order.examples(step, batch_size, rows)
      return self._train_batch(step, range(batch_size)[rows], examples)

    return self._iterate(grain.MapDataset.range(_STEPS).map(make), start_step)

  def eval_batches(self, batch_size: int, rows: slice = slice(None)) -> Iterator[Batch]:
    """Returns every example once, in order; the last batch is padded with zeros.

    Args:
      batch_size: Size of every batch, including the last.
      rows: Rows of each batch to make, as in `train_batches`.

    Returns:
      An iterator over `image` uint8[b h w 3], `label` int32[b], `index` int64[b] in the source (-1
      for padding) and `mask` float32[b], 1 for examples, 0 for padding and corrupt images. At its
      end, it raises a UserError if all images are corrupt.
    """
    _check_batch_size(batch_size)
    count = math.ceil(self.num_examples / batch_size)

    def make(step: int) -> Batch:
      return self._eval_batch(np.arange(step * batch_size, (step + 1) * batch_size)[rows])

    return self._with_some_readable(self._iterate(grain.MapDataset.range(count).map(make), 0))

  def sample(self, count: int) -> Batch:
    """Returns a few images to plot, spread evenly over the data set.

    Args:
      count: Number of images; if larger than the data set, all images are returned.

    Returns:
      `image` uint8[n h w 3], `label` int32[n] and `index` int64[n] in the source.
    """
    count = min(count, self.num_examples)
    positions = np.arange(count) * self.num_examples // max(count, 1)
    return _stack([self._reader.readable(int(p)) for p in positions])

  def _with_some_readable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
    found = False
    for batch in batches:
      found = found or bool(batch["mask"].any())
      yield batch
    if not found:
      raise self._reader.only_corrupt()

  def _iterate(self, batches: grain.MapDataset, start_step: int) -> Iterator[Batch]:
    """Makes the batches in threads, a few batches ahead."""
    threads = self._workers if self._reader.memory is None else 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return _with_one_line_errors(iterator)

  def _train_batch(self, step: int, rows: range, positions: list[int]) -> Batch:
    """Makes rows of a batch; their augmentation depends only on the seed, the step and the row."""
    config = self._augmentation
    if config.augment in CROPS:
      items = map(self._reader.readable, positions, self._generators("augment", step, rows))
    else:
      items = map(self._reader.readable, positions)
    batch = _stack(list(items))
    if config.augment == "flip_shift":
      draws = self._generators("augment", step, rows)
      batch["image"] = transforms.random_flip_shift(batch["image"], draws)
    if config.erase:
      draws = self._generators("erase", step, rows)
      boxes = [mixing.draw_erased(self.pre.image_size, rng, config.erase) for rng in draws]
      batch["erased"] = np.array(boxes, np.int32)
    if config.mixup or config.cutmix:
      rng = generator(self._seed, "mix", step)
      share, box = mixing.draw_mix(self.pre.image_size, rng, config.mixup, config.cutmix)
      batch["mix_share"] = np.full(len(rows), share, np.float32)
      batch["mix_box"] = np.tile(np.array(box, np.int32), (len(rows), 1))
    return batch

  def _generators(self, purpose: str, step: int, rows: range) -> list[np.random.Generator]:
    return [generator(self._seed, purpose, step, row) for row in rows]

  def _eval_batch(self, positions: np.ndarray) -> Batch:
    padding = Item(np.zeros((*self.pre.image_size, 3), np.uint8), 0, -1)
    items, mask = [], []
    for position in positions:
      item = self._reader.item(int(position)) if position < self.num_examples else None
      items.append(item or padding)
      mask.append(item is not None)
    return _stack(items) | {"mask": np.array(mask, np.float32)}


def _with_one_line_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
  """Yields the batches; removes the traceback that Grain appends to an error's message."""
  try:
    yield from batches
  except UserError as error:
    raise UserError(str(error).splitlines()[0]) from error


def _stack(items: list[Item]) -> Batch:
  return {
    "image": np.stack([item.image for item in items]),
    "label": np.array([item.label for item in items], np.int32),
    "index": np.array([item.index for item in items], np.int64),
  }


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise UserError(f"batch_size: expected at least 1, got {batch_size}.")
