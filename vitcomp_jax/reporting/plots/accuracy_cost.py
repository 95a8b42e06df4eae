"""Accuracy against compute."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.labels import label_points
from vitcomp_jax.reporting.plots.style import (
  BLACK,
  COLORS,
  LINES,
  MARKERS,
  SMALL,
  columns,
  name_axes,
  subplots,
)
from vitcomp_jax.results import Row

_MOST_LABELS = 12  # points with names of their own; more get a legend


def accuracy_against_gmacs(
  rows: Sequence[Row],
  cloud: Sequence[tuple[float, float]] = (),
  published: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
  """Draws top-1 accuracy against compute; rows of one method at several budgets are joined.

  Args:
    rows: Of a result; those without `top1` or `gmacs` are left out.
    cloud: GMACs and top-1 of random schedules.
    published: By where they stand, GMACs and top-1 that were not measured here: open markers.
  """
  figure, axes = subplots(width=9.0 if published else 7.0, height=4.6)
  if cloud:
    axes.plot(*columns(cloud), ".", color="#B0B0B0", markersize=3, zorder=1)
  methods: dict[str, list[tuple[float, float]]] = {}
  labels: list[tuple[float, float, str, str]] = []
  for row in rows:
    if row.top1 is not None and row.gmacs is not None:
      point = row.gmacs, row.top1
      methods.setdefault(row.series, []).append(point)
      labels.append((*point, row.name, _method_style(row.series, list(methods))[0]))
  for source, points in (published or {}).items():
    color, marker, size = _method_style(source, list(published or {}))
    axes.plot(
      *columns(sorted(points)),
      label=source,
      color=color,
      linestyle=":",
      linewidth=1,
      marker=marker,
      markersize=size - 1,
      markerfacecolor="none",
    )
  for index, (method, points) in enumerate(methods.items()):
    color, marker, size = _method_style(method, list(methods))
    line = LINES[index // len(COLORS) % len(LINES)]
    axes.plot(
      *columns(sorted(points)),
      label=f"{method}, measured" if published else method,
      color=color,
      linestyle=line,
      linewidth=1,
      marker=marker,
      markersize=size,
    )
  axes.margins(0.18)
  name_axes(axes, "GMACs per image", "top-1 accuracy (%)")
  axes.ticklabel_format(useOffset=False)
  if published or len(labels) > _MOST_LABELS:
    axes.margins(0.05)
    axes.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
  else:
    label_points(figure, axes, labels)
  return figure


def _method_style(method: str, methods: list[str]) -> tuple[str, str, float]:
  """Colour, marker and its size."""
  if method.startswith("dense"):
    return BLACK, "*", 13
  index = [m for m in methods if not m.startswith("dense")].index(method)
  return COLORS[index % (len(COLORS) - 1)], MARKERS[index % len(MARKERS)], 8
