"""Plots of CLS attention."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.image_grid import enlarge, hatched, mosaic, spread

_COLORS = ScalarMappable(LogNorm(0.1, 10, clip=True), colormaps["cividis"])
_DARK, _HATCH = 25, 70  # gray levels of pruned patches


def cls_attention(
  images: np.ndarray,
  shares: Mapping[str, np.ndarray],
  grid: tuple[int, int],
  titles: Sequence[str],
  about: str = "",
) -> Figure:
  """Draws how much attention CLS pays each patch, image by image.

  Args:
    images: uint8[n h w 3].
    shares: Each patch's share of the attention by layer name, f[n p]; -1: pruned.
    grid: Rows and columns of patches.
    titles: Titles of the images.
    about: Sentence to add below, such as the model's name.
  """
  blocks = []
  for i, (title, image) in enumerate(zip(titles, images, strict=True)):
    block = [(title, enlarge(image))]
    for name, share in shares.items():
      block.append((name, attention_map(image, share[i], grid)))
    blocks.append(block)
  return mosaic(
    blocks,
    f"{about} A token's attention, the mean over the heads, is spread evenly over its patches. "
    "Dark, hatched: pruned before this layer.",
    _COLORS,
    "times an even share",
  )


def attention_map(image: np.ndarray, share: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Draws the patches' attention, hatched where pruned.

  Args:
    image: uint8[h w 3], which sets the size of the picture.
    share: Each patch's share of the attention, f[p], as in `cls_attention`.
    grid: Rows and columns of patches.

  Returns:
    uint8[h w 3].
  """
  relative = spread(np.asarray(share) * len(share), enlarge(image).shape, grid)
  picture = _COLORS.to_rgba(relative, bytes=True)[..., :3].copy()
  picture[relative < 0] = _DARK
  picture[hatched(relative < 0)] = _HATCH
  return picture
