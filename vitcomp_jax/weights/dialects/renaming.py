"""Renames, drops, reshapes and joins tensors without reading them."""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from vitcomp_jax.weights.tensors import State, Tensor, concatenate

Array = Tensor | np.ndarray
_MAX_LISTED = 5  # number of names to list in the log


def renamed(
  tensors: State,
  patterns: Sequence[tuple[str, str]],
  dropped: Iterable[str] = (),
) -> dict[str, Array]:
  """Renames tensors, and drops and logs those that the model does not use.

  Args:
    tensors: Tensors by name.
    patterns: Regular expressions and the replacement of each match; applied in order, each to the
      result of the previous one.
    dropped: Regular expressions for whole names.

  Returns:
    Tensors by new name; names that no expression matches are unchanged.
  """
  drop = re.compile("|".join(f"(?:{pattern})" for pattern in dropped) or r"(?!)")
  unused = [name for name in tensors if drop.fullmatch(name)]
  if unused:
    logging.info("weights: left out what the model does not use: %s", _listed(unused))
  found = {}
  for name, tensor in tensors.items():
    if drop.fullmatch(name):
      continue
    for pattern, replacement in patterns:
      name = re.sub(pattern, replacement, name)
    found[name] = tensor
  return found


def has(names: Collection[str], pattern: str) -> bool:
  """Returns whether a regular expression matches any whole name."""
  return any(re.fullmatch(pattern, name) for name in names)


def changed(
  tensor: Array, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None
) -> Array:
  """Returns a tensor that is changed when it is read, or a changed array.

  Args:
    tensor: The tensor.
    change: Function of the array.
    shape: Shape of what `change` returns; None if it keeps the shape.
  """
  return tensor.map(change, shape) if isinstance(tensor, Tensor) else change(tensor)


def reshaped(tensor: Array, *shape: int) -> Array:
  """Returns a tensor with another shape."""
  return changed(tensor, lambda array: array.reshape(shape), shape)


def transposed(tensor: Array) -> Array:
  """Returns the transpose of a matrix."""
  return changed(tensor, lambda array: array.T, tensor.shape[::-1])


def rows(tensor: Array, start: int, stop: int) -> Array:
  """Returns a range of rows, along the first axis."""
  shape = (stop - start, *tensor.shape[1:])
  return changed(tensor, lambda array: array[start:stop], shape)


def thirds(tensor: Array) -> tuple[Array, Array, Array]:
  """Splits the first axis into three parts: queries, keys and values."""
  size = tensor.shape[0] // 3
  return rows(tensor, 0, size), rows(tensor, size, 2 * size), rows(tensor, 2 * size, 3 * size)


def fuse(state: dict[str, Array], names: Sequence[str], into: str) -> None:
  """Joins tensors along their first axis under a new name, in place."""
  state[into] = concatenate([state.pop(name) for name in names])


def as_head(weight: Array, bias: Array | None = None) -> dict[str, Array]:
  """Returns a projection, f[c d], as a classifier, whose bias is zero if none is given."""
  bias = np.zeros(weight.shape[0], weight.dtype) if bias is None else bias
  return {"head.weight": weight, "head.bias": bias}


def _listed(names: Sequence[str]) -> str:
  more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
  return ", ".join(names[:_MAX_LISTED]) + more
