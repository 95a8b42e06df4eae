"""Style shared by all plots: colours, sizes, axes and saving."""

import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitcomp_jax.atomic import replacing

DPI = 150
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GRAY = "#CC79A7", "#56B4E9", "#000000", "#6E6E6E"
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
TITLE, TEXT, SMALL = 11, 10, 9  # font sizes in points

# Without date and version, equal plots give equal files.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def save(figure: Figure, folder: pathlib.Path, name: str) -> None:
  """Writes NAME.png and NAME.svg, each atomically."""
  folder.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context({"svg.hashsalt": "vitcomp_jax"}):
    for kind, metadata in _METADATA.items():
      with replacing(folder / f"{name}.{kind}") as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI, facecolor="white", metadata=metadata)


def new_figure(
  width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
  """Returns an empty figure, sized in inches, without pyplot, which would keep a reference."""
  figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
  FigureCanvasAgg(figure)
  return figure


def subplots(width: float, height: float, rows: int = 1) -> tuple[Figure, Axes]:
  """Returns a figure of stacked panels and its top panel; `figure.axes` has all panels."""
  figure = new_figure(width, height)
  panels = figure.subplots(rows, 1, sharex=True, squeeze=False)
  return figure, panels[0, 0]


def name_axes(axes: Axes, x: str, y: str) -> None:
  """Labels the axes and adds a grid, without a box."""
  axes.set_xlabel(x, fontsize=TITLE)
  axes.set_ylabel(y, fontsize=TITLE)
  axes.tick_params(labelsize=TEXT)
  axes.grid(True, color="#DDDDDD", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
  """Converts points to the two columns that `plot` takes."""
  return [x for x, _ in points], [y for _, y in points]


def number(value: float) -> str:
  """Formats a number, such as GMACs, with four significant digits."""
  if value == 0 or not math.isfinite(value):
    return str(value)
  return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
