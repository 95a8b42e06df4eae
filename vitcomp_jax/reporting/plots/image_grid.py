"""Figures made of pictures, and pictures made of patches."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.style import DPI, SMALL, new_figure

Picture = tuple[str, np.ndarray]  # title, and uint8[h w 3]

_CELL = 240  # approximate longer side of a picture, in pixels
_GAP, _HEAD, _FOOT_LINE, _BAR = 14, 30, 24, 64  # pixels
_MOST_COLUMNS = 5  # so that pictures are large enough on a printed page
_FOOT = 8  # font size in points


def mosaic(
  blocks: Sequence[Sequence[Picture]],
  foot: str,
  bar: ScalarMappable | None = None,
  bar_label: str = "",
) -> Figure:
  """Arranges pictures in a figure, so that each of their pixels is one pixel of the PNG.

  Args:
    blocks: Pictures of one size, one block per image, each on as many lines as it needs.
    foot: Text below the pictures.
    bar: Colour map for a colour bar; None: no bar.
    bar_label: Label of the colour bar.
  """
  h, w, _ = blocks[0][0][1].shape
  lines = math.ceil(len(blocks[0]) / _MOST_COLUMNS)
  columns = math.ceil(len(blocks[0]) / lines)
  width = _GAP + columns * (w + _GAP)
  top_of_foot = len(blocks) * (lines * (_HEAD + h) + _GAP)
  wrapped = textwrap.wrap(foot, max(30, width // 10))
  height = top_of_foot + len(wrapped) * _FOOT_LINE + _GAP + (_BAR if bar else 0)
  figure = new_figure(width / DPI, height / DPI, layout=None)

  def write(x: float, y: float, text: str, **options: Any) -> None:
    figure.text(x / width, 1 - y / height, text, **options)

  def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
    return x / width, 1 - (y + h) / height, w / width, h / height

  for b, block in enumerate(blocks):
    for i, (head, picture) in enumerate(block):
      x = _GAP + i % columns * (w + _GAP)
      y = b * (lines * (_HEAD + h) + _GAP) + i // columns * (_HEAD + h) + _HEAD
      write(x, y - 5, _shortened(head, w), fontsize=SMALL, va="bottom")
      axes = figure.add_axes(box(x, y, w, h))
      axes.imshow(picture, interpolation="nearest", aspect="auto")
      axes.set_axis_off()
  write(_GAP, top_of_foot, "\n".join(wrapped), fontsize=_FOOT, va="top", color="#303030")
  if bar:
    place = figure.add_axes(box(2 * _GAP, height - _BAR - 4, min(width - 4 * _GAP, 2 * w), 14))
    colors = figure.colorbar(bar, cax=place, orientation="horizontal", format="%g")
    colors.set_label(bar_label, fontsize=_FOOT, labelpad=1)
    colors.ax.tick_params(labelsize=_FOOT, pad=1)
  return figure


def _shortened(text: str, width: int) -> str:
  """Shortens a title to fit above an image."""
  most = width // 10  # about 10 pixels per letter
  return text if len(text) <= most else f"{text[: most - 1]}…"


def enlarge(image: np.ndarray) -> np.ndarray:
  """Enlarges an image to about 240 pixels on the longer side, by repeating pixels."""
  scale = max(1, round(_CELL / max(image.shape[:2])))
  return image.repeat(scale, 0).repeat(scale, 1)


def spread(values: np.ndarray, shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
  """Returns the value of each pixel's patch."""
  y = np.arange(shape[0]) * grid[0] // shape[0]
  x = np.arange(shape[1]) * grid[1] // shape[1]
  return np.asarray(values).reshape(grid)[y[:, None], x[None]]


def hatched(mask: np.ndarray) -> np.ndarray:
  """Returns the hatched pixels of a mask, bool[h w]."""
  y, x = np.indices(mask.shape)
  return np.asarray(mask & ((x + y) % 12 < 2))
