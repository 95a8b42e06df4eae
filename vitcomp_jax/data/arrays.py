"""Endless batches from arrays in memory, or from any iterable of batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard, cast

import numpy as np
from numpy.typing import ArrayLike

from vitcomp_jax.errors import UserError

Batch = dict[str, np.ndarray]


def endless_batches(data: object, batch_size: int, seed: int) -> tuple[Iterator[Batch], bool]:
  """Returns endless batches, and whether they have labels.

  Args:
    data: Images [n h w 3]; a tuple of images and labels [n]; or an iterable of batches, each of
      which is an array of images, a tuple of images and labels, or a mapping with `image` and
      optionally `label`. Arrays are reshuffled every epoch; an iterable is repeated.
    batch_size: Size of batches from arrays.
    seed: Seed of the shuffling.

  Returns:
    An iterator over `image` [b h w 3] and `label` int32[b] (0 without labels); and whether there
    are labels.

  Raises:
    UserError: If `data` has another type or has no images; while iterating, if only some batches
      have labels, or if an iterable cannot be repeated.
  """
  if hasattr(data, "shape") or (isinstance(data, tuple) and _is_pair(data)):
    stream = _drawn(_batch(data), batch_size, seed)
  elif isinstance(data, Iterable):
    stream = _repeated(data)
  else:
    raise UserError(f"data: expected arrays or an iterable of batches, got {type(data).__name__}.")
  first = next(stream)
  has_labels = "label" in first
  return _labelled(itertools.chain([first], stream), has_labels), has_labels


def _is_pair(data: object) -> TypeGuard[tuple[ArrayLike, ArrayLike]]:
  """Returns whether the data are a pair of images and labels, rather than two batches."""
  if not (isinstance(data, tuple | list) and len(data) == 2 and hasattr(data[0], "shape")):
    return False
  # Labels of a wrong shape still count as labels; an array with four axes holds images.
  return len(data[0].shape) == 4 and len(getattr(data[1], "shape", (0,))) < 4


def _batch(data: object) -> Batch:
  """Returns the images, and the labels if there are any, by name."""
  if isinstance(data, Mapping):
    given = {name: data[name] for name in ("image", "label") if name in data}
  elif _is_pair(data):
    given = {"image": data[0], "label": data[1]}
  else:
    given = {"image": cast(ArrayLike, data)}
  try:
    found = {name: np.asarray(values) for name, values in given.items()}
  except ValueError as error:
    raise UserError(
      f"data: expected batches of images of one size, got something else ({error})."
    ) from error
  shape = found["image"].shape if "image" in found else ()
  if len(shape) != 4 or shape[-1] != 3 or not shape[0]:
    raise UserError(f"data: expected images of shape [n, height, width, 3], got {list(shape)}.")
  if "label" in found:
    _check_labels(found["label"], shape[0])
  return found


def _check_labels(labels: np.ndarray, count: int) -> None:
  """Rejects labels that are not one class index per image."""
  if labels.shape != (count,):
    raise UserError(
      f"data: expected {count} labels, one for each image, got an array of shape "
      f"{list(labels.shape)}."
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise UserError(f"data: expected whole numbers as labels, got {labels.dtype}.")


def _drawn(arrays: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
  """Yields batches in random order; a batch may span two epochs."""
  rng, count = np.random.default_rng(seed), len(arrays["image"])
  order = rng.permutation(count)
  while True:
    while len(order) < batch_size:
      order = np.concatenate([order, rng.permutation(count)])
    rows, order = order[:batch_size], order[batch_size:]
    yield {name: values[rows] for name, values in arrays.items()}


def _repeated(data: Iterable[object]) -> Iterator[Batch]:
  """Yields the batches of an iterable, repeated endlessly."""
  total = 0
  while True:
    before = total
    for batch in data:
      total += 1
      yield _batch(batch)
    if total == before:
      raise UserError(
        f"data: expected more batches than {total}; give an iterable that can begin again, such as "
        "a list or a data loader, or ask for fewer steps."
      )


def _labelled(stream: Iterator[Batch], has_labels: bool) -> Iterator[Batch]:
  """Yields batches with labels, which are zero if there are none."""
  for batch in stream:
    if ("label" in batch) != has_labels:
      raise UserError("data: expected labels in every batch or in none, got both.")
    count = len(batch["image"])
    yield {"image": batch["image"], "label": batch.get("label", np.zeros(count)).astype(np.int32)}
