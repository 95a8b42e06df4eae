"""Tensors in files that are read only when needed, one at a time."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from vitcomp_jax.weights.unreadable import damaged


@dataclasses.dataclass(frozen=True)
class Tensor(abc.ABC):
  """A tensor in a file that NumPy accepts as an array: `np.asarray(tensor)` reads it.

  It holds no open file and keeps nothing in memory, so reading it twice reads the file twice.

  Attributes:
    shape: Lengths of the axes.
    dtype: Type of the values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype

  @abc.abstractmethod
  def read(self) -> np.ndarray:
    """Reads the values."""

  @property
  def ndim(self) -> int:
    """Returns the number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Returns the number of values."""
    return math.prod(self.shape)

  def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
    """Reads the values, when NumPy asks for them."""
    if copy is False:
      raise ValueError("a tensor of a file cannot be had without a copy")
    array = self.read()
    return array if dtype is None else array.astype(dtype, copy=False)

  def map(
    self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None
  ) -> "Tensor":
    """Returns a tensor that is changed after it is read.

    Args:
      change: Function of the array, such as a transpose; keeps the dtype.
      shape: Shape of what `change` returns; None if it keeps the shape.
    """
    return Computed(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))

  def astype(self, dtype: np.typing.DTypeLike) -> "Tensor":
    """Returns a tensor that is converted after it is read."""
    return Computed(self.shape, np.dtype(dtype), lambda: self.read().astype(dtype, copy=False))

  def row(self, index: int) -> "Tensor":
    """Returns the part at `index` of the first axis."""
    return self.map(lambda array: array[index], self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Stored(Tensor):
  """A tensor whose bytes are contiguous in a file.

  Attributes:
    path: The file.
    offset: Offset of the tensor in the file, in bytes.
  """

  path: Path
  offset: int

  def read(self) -> np.ndarray:
    try:
      # A memory-mapped file would count as resident memory in addition to the array.
      array = np.fromfile(self.path, self.dtype, self.size, offset=self.offset)
      return array.reshape(self.shape)
    # The file existed, and was long enough, when it was opened.
    except (OSError, ValueError) as error:
      raise damaged(self.path, error) from error

  def row(self, index: int) -> Tensor:
    """Returns the part at `index` of the first axis; only that part is read."""
    size = self.dtype.itemsize * math.prod(self.shape[1:])
    return Stored(self.shape[1:], self.dtype, self.path, self.offset + index * size)


@dataclasses.dataclass(frozen=True)
class Computed(Tensor):
  """A tensor that a function reads and returns.

  Attributes:
    load: Returns an array of the tensor's shape and dtype.
  """

  load: Callable[[], np.ndarray]

  def read(self) -> np.ndarray:
    return self.load()


# Tensors of a model by name. They may be arrays or tensors in files, so use only `shape`, `ndim`,
# `dtype`, `astype` and `np.asarray`.
State = Mapping[str, Tensor | np.ndarray]


def concatenate(parts: Sequence[Tensor | np.ndarray], axis: int = 0) -> Tensor:
  """Joins tensors into one, whose parts are read when it is read.

  Args:
    parts: Tensors whose shapes are equal except along `axis`.
    axis: The axis along which to join them, counted from the first or, if negative, the last.

  Raises:
    ValueError: If their shapes do not fit.
  """
  rests = {(*part.shape[:axis], None, *part.shape[axis:][1:]) for part in parts}
  if len(rests) != 1:
    raise ValueError(f"shapes {[part.shape for part in parts]} cannot be joined along {axis}")
  shape = list(parts[0].shape)
  shape[axis] = sum(part.shape[axis] for part in parts)
  dtype = np.result_type(*(part.dtype for part in parts))
  return Computed(
    tuple(shape), dtype, lambda: np.concatenate([np.asarray(part) for part in parts], axis)
  )


def widened(tensor: Tensor) -> Tensor:
  """Converts half precision to float32, and leaves other types unchanged."""
  half = tensor.dtype in (np.float16, ml_dtypes.bfloat16)
  return tensor.astype(np.float32) if half else tensor
