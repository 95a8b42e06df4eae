"""Plots of what becomes of an image's patches."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.image_grid import enlarge, hatched, mosaic, spread

_OUTLINE = (230, 159, 0)  # style.ORANGE: seen on black as on white
_GRID = (110, 110, 110)  # between patches that still are tokens of their own


def token_maps(
  images: np.ndarray,
  sources: Mapping[str, np.ndarray],
  num_prefix: int,
  grid: tuple[int, int],
  titles: Sequence[str],
  about: str = "",
) -> Figure:
  """Draws which patches were pruned and which share a token, image by image.

  Args:
    images: uint8[n h w 3].
    sources: Under the names of layers, int[n p]: the token that holds each patch; -1 pruned.
    num_prefix: Tokens that hold no patch.
    grid: Rows and columns of patches.
    titles: Of the images.
    about: A sentence of its own, such as which model it is.
  """
  blocks = [
    [
      (title, enlarge(image)),
      *(
        (f"{name}: {_count(source[i], num_prefix)} tokens", token_map(image, source[i], grid))
        for name, source in sources.items()
      ),
    ]
    for i, (title, image) in enumerate(zip(titles, images, strict=True))
  ]
  foot = (
    f"{about} Orange: outlines of tokens that stand for several patches, in their mean colour "
    "(parts of one token may lie apart). Gray: patches with a token of their own."
  )
  if any((source < 0).any() for source in sources.values()):
    foot += " Dark, hatched: pruned."
  return mosaic(blocks, foot.strip())


def _count(source: np.ndarray, num_prefix: int) -> int:
  """Tokens of one image."""
  return num_prefix + len(np.unique(source[source >= 0]))


def token_map(image: np.ndarray, source: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Draws an image's groups, enlarged, with outlines between them and hatched where pruned.

  Args:
    image: uint8[h w 3].
    source: int[p], as in `paint_groups`.
    grid: Rows and columns of patches.

  Returns:
    uint8[h w 3], each side `scale` times as long.
  """
  picture = enlarge(paint_groups(image, source, grid))
  group = spread(np.asarray(source), picture.shape, grid)
  picture[hatched(group < 0)] += 45  # Pruned patches are at most 51.
  patch = spread(np.arange(grid[0] * grid[1]), picture.shape, grid)
  size = np.array([np.sum(source == s) if s >= 0 else 0 for s in source])[patch]
  picture[_edges(group, 1)] = _GRID
  picture[_edges(group, 2) & _near(size > 1, 2)] = _OUTLINE
  return picture


def _edges(group: np.ndarray, width: int) -> np.ndarray:
  """Pixels at most `width / 2` from another group."""
  edges = np.zeros(group.shape, bool)
  across, down = group[:, 1:] != group[:, :-1], group[1:] != group[:-1]
  edges[:, 1:] |= across
  edges[1:] |= down
  if width > 1:
    edges[:, :-1] |= across
    edges[:-1] |= down
  return edges


def _near(mask: np.ndarray, distance: int) -> np.ndarray:
  """Pixels at most `distance` from one in the mask, along each axis."""
  padded = np.pad(mask, distance)
  span = 2 * distance + 1
  windows = np.lib.stride_tricks.sliding_window_view(padded, (span, span))
  return np.asarray(windows.any((2, 3)))


def paint_groups(image: np.ndarray, source: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Paints patches that share a token in their mean colour; pruned ones at 20 % brightness.

  A patch that shares its token with no other stays as it is.

  Args:
    image: uint8[h w 3].
    source: int[p]: the token that holds each patch, row by row; -1 pruned.
    grid: Rows and columns of patches.

  Returns:
    uint8[h w 3].
  """
  source = np.asarray(source)
  group = spread(source, image.shape, grid)
  painted = image.copy()
  for token in np.unique(source):
    inside = group == token
    if token < 0:
      painted[inside] = np.rint(0.2 * image[inside]).astype(np.uint8)
    elif np.sum(source == token) > 1:
      painted[inside] = np.rint(image[inside].mean(axis=0)).astype(np.uint8)
  return painted
