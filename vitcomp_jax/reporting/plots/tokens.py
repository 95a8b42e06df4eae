"""Plots of the pruned and merged patches of images."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.image_grid import enlarge, hatched, mosaic, spread

_OUTLINE = (230, 159, 0)  # style.ORANGE, visible on black and on white
_GRID = (110, 110, 110)  # between patches with a token of their own


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
    sources: Token that holds each patch by layer name, int[n p]; -1: pruned.
    num_prefix: Number of tokens that hold no patch.
    grid: Rows and columns of patches.
    titles: Titles of the images.
    about: Sentence to add below, such as the model's name.
  """
  blocks = []
  for i, (title, image) in enumerate(zip(titles, images, strict=True)):
    block = [(title, enlarge(image))]
    for name, source in sources.items():
      head = f"{name}: {_count(source[i], num_prefix)} tokens"
      block.append((head, token_map(image, source[i], grid)))
    blocks.append(block)
  foot = (
    f"{about} Orange: outlines of tokens that stand for several patches, in their mean colour "
    "(parts of one token may lie apart). Gray: patches with a token of their own."
  )
  if any((source < 0).any() for source in sources.values()):
    foot += " Dark, hatched: pruned."
  return mosaic(blocks, foot.strip())


def _count(source: np.ndarray, num_prefix: int) -> int:
  """Counts the tokens of one image."""
  return num_prefix + len(np.unique(source[source >= 0]))


def token_map(image: np.ndarray, source: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Draws an enlarged image with merged patches outlined and pruned patches hatched.

  Args:
    image: uint8[h w 3].
    source: Token that holds each patch, int[p], as in `paint_groups`.
    grid: Rows and columns of patches.

  Returns:
    uint8[h w 3], enlarged.
  """
  picture = enlarge(paint_groups(image, source, grid))
  group = spread(np.asarray(source), picture.shape, grid)
  picture[hatched(group < 0)] += 45  # pixels of pruned patches are at most 51
  patch = spread(np.arange(grid[0] * grid[1]), picture.shape, grid)
  size = np.array([np.sum(source == s) if s >= 0 else 0 for s in source])[patch]
  picture[_edges(group, 1)] = _GRID
  picture[_edges(group, 2) & _near(size > 1, 2)] = _OUTLINE
  return picture


def _edges(group: np.ndarray, width: int) -> np.ndarray:
  """Returns the pixels that are at most `width / 2` from another group."""
  edges = np.zeros(group.shape, bool)
  across, down = group[:, 1:] != group[:, :-1], group[1:] != group[:-1]
  edges[:, 1:] |= across
  edges[1:] |= down
  if width > 1:
    edges[:, :-1] |= across
    edges[:-1] |= down
  return edges


def _near(mask: np.ndarray, distance: int) -> np.ndarray:
  """Returns the pixels that are at most `distance` from a masked pixel along each axis."""
  padded = np.pad(mask, distance)
  span = 2 * distance + 1
  windows = np.lib.stride_tricks.sliding_window_view(padded, (span, span))
  return np.asarray(windows.any((2, 3)))


def paint_groups(image: np.ndarray, source: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Paints patches that share a token in their mean colour, and pruned ones at 20 % brightness.

  A patch with a token of its own stays unchanged.

  Args:
    image: uint8[h w 3].
    source: Token that holds each patch, row by row, int[p]; -1: pruned.
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
