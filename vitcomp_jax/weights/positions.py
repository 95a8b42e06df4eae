"""Resamples position embeddings for another grid of patches."""

import numpy as np
from jaxtyping import Float


def resample_positions(
  positions: Float[np.ndarray, "1 n d"],
  prefix: int,
  old_grid: tuple[int, int],
  new_grid: tuple[int, int],
  antialias: bool,
) -> Float[np.ndarray, "1 m d"]:
  """Resizes position embeddings bicubically, along rows and columns separately.

  Both rules agree with PyTorch's bicubic `interpolate` with `align_corners=False`. They differ even
  when the grid grows: in the kernel's parameter and at the borders.

  Args:
    positions: Embeddings of the prefix tokens, then of the patches in row-major order.
    prefix: Number of prefix tokens, whose embeddings are unchanged.
    old_grid: Patches per column and per row (height, width) of `positions`.
    new_grid: Patches per column and per row of the result.
    antialias: True for timm's rule, False for the rule of DINOv2's authors.

  Returns:
    Embeddings with m = `prefix + new_grid[0] * new_grid[1]`; float64 if the input is, or else
    float32.

  Raises:
    ValueError: If the number of embeddings does not match the prefix and the old grid.

  References:
    Keys, Cubic convolution interpolation for digital image processing, 1981, Eq. 4 and 15.
  """
  if positions.shape[1] != prefix + old_grid[0] * old_grid[1]:
    raise ValueError(f"positions: expected {prefix} + {old_grid} rows, got {positions.shape[1]}")
  dtype = np.float64 if positions.dtype == np.float64 else np.float32
  if old_grid == new_grid:
    return positions.astype(dtype)
  weights = antialiased_weights if antialias else plain_weights
  rows, columns = (weights(n, m) for n, m in zip(old_grid, new_grid, strict=True))
  patches = positions[0, prefix:].reshape(*old_grid, -1).astype(np.float64)
  resized = np.einsum("yi,xj,ijd->yxd", rows, columns, patches, optimize=True)
  resized = resized.reshape(1, -1, patches.shape[-1])
  return np.concatenate([positions[:, :prefix], resized], axis=1).astype(dtype)


def antialiased_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Computes the weights of bicubic resizing with antialiasing (a = -0.5, renormalised).

  Args:
    old: Number of input samples.
    new: Number of output samples.

  Returns:
    A row of weights for each output sample, with sum 1.
  """
  scale = old / new
  stretch = max(scale, 1.0)
  weights = np.zeros((new, old))
  for i in range(new):
    centre = (i + 0.5) * scale
    first = max(int(centre - 2 * stretch + 0.5), 0)
    end = min(int(centre + 2 * stretch + 0.5), old)
    taps = np.arange(first, end)
    weights[i, first:end] = keys_kernel((taps - centre + 0.5) / stretch, a=-0.5)
  weights /= weights.sum(axis=1, keepdims=True)
  return weights


def plain_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Computes the weights of bicubic resizing with four taps and repeated borders (a = -0.75).

  Args:
    old: Number of input samples.
    new: Number of output samples.

  Returns:
    A row of weights for each output sample, with sum 1.
  """
  weights = np.zeros((new, old))
  centre = (np.arange(new) + 0.5) * (old / new) - 0.5
  for offset in range(-1, 3):
    tap = np.floor(centre).astype(int) + offset
    # Taps beyond the border share one sample, so their weights must add up.
    np.add.at(
      weights,
      (np.arange(new), np.clip(tap, 0, old - 1)),
      keys_kernel(centre - tap, a=-0.75),
    )
  return weights


def keys_kernel(x: Float[np.ndarray, "..."], a: float) -> Float[np.ndarray, "..."]:
  """Evaluates Keys' piecewise cubic kernel: 1 at 0, 0 at other integers and beyond 2.

  Args:
    x: Distances, in samples.
    a: Slope at 1.

  Returns:
    The weight at each distance.
  """
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
