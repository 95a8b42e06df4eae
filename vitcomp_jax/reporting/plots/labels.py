"""Labels beside points, placed without overlaps."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from vitcomp_jax.reporting.plots.style import GRAY, SMALL


def label_points(
  figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]]
) -> None:
  """Writes a label beside each point, avoiding other labels, points and lines.

  Args:
    figure: The figure, whose layout is fixed here.
    axes: Axes with the points drawn.
    labels: x, y, text and colour of each point's label.
  """
  figure.draw_without_rendering()
  figure.set_layout_engine("none")  # the layout must not change after this
  centers = [axes.transData.transform(label[:2]) for label in labels]
  taken = [Bbox.from_bounds(x - 12, y - 12, 24, 24) for x, y in centers]
  taken += _along_lines(axes)
  order = sorted(range(len(labels)), key=lambda i: (-centers[i][1], centers[i][0]))
  for i in order:
    x, y, name, color = labels[i]
    text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=SMALL)
    text.set(va="bottom", color=_darker(color))
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    extent = text.get_window_extent()
    boxes = list(_boxes(centers[i], extent.width, extent.height))
    badness = [_badness(b, taken, axes.bbox) + _covered(b, centers[i], centers) for b in boxes]
    box = boxes[int(np.argmin(badness))]
    text.set_position(tuple((box.p0 - centers[i]) * 72 / figure.dpi))
    taken.append(box)
    if _distance(box, centers[i]) > 24:
      end = np.clip(centers[i], box.p0, box.p1)
      ends = axes.transData.inverted().transform([centers[i], end])
      axes.plot(*ends.T, color=GRAY, linewidth=0.7, zorder=1, scalex=False, scaley=False)


def _along_lines(axes: Axes) -> list[Bbox]:
  """Returns small boxes along the drawn lines, in pixels."""
  boxes = []
  for line in axes.lines:
    points = axes.transData.transform(line.get_xydata())
    for start, end in zip(points[:-1], points[1:], strict=True):
      steps = 2 + int(np.hypot(*(end - start)) / 6)
      boxes += [Bbox([p - 2, p + 2]) for p in np.linspace(start, end, steps)]
  return boxes


def _darker(color: str) -> tuple[float, ...]:
  """Darkens a colour for text, which needs more contrast than a marker."""
  return tuple(0.65 * part for part in to_rgb(color))


def _boxes(center: np.ndarray, width: float, height: float) -> Iterator[Bbox]:
  """Yields candidate places of a label in pixels, best first."""
  for away in (17, 32, 52, 76, 105):
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
      x = center[0] + dx * away - width * (1 - dx) / 2
      y = center[1] + dy * away - height * (1 - dy) / 2
      yield Bbox.from_bounds(x, y, width, height)


def _badness(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
  """Computes the area of a box that overlaps other boxes or lies outside the frame, in pixels."""
  inside = Bbox.intersection(box, frame)
  outside = box.width * box.height - (inside.width * inside.height if inside else 0)
  shared = (Bbox.intersection(box, other) for other in taken)
  return float(round(outside + sum(s.width * s.height for s in shared if s), 3))


def _covered(box: Bbox, center: np.ndarray, centers: Sequence[np.ndarray]) -> float:
  """Computes a penalty for other points near the line from a point to its label."""
  path = np.linspace(center, np.clip(center, box.p0, box.p1), 20)
  others = [c for c in centers if np.hypot(*(c - center)) > 8]
  return 50.0 * sum(bool(np.any(np.hypot(*(path - c).T) < 8)) for c in others)


def _distance(box: Bbox, point: np.ndarray) -> float:
  return float(np.hypot(*(np.clip(point, box.p0, box.p1) - point)))
