"""Accuracy against compute."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
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

_MOST_LABELS = 12  # maximum number of labelled points; more points get a legend


def accuracy_against_gmacs(
  rows: Sequence[Row | Mapping[str, object]],
  cloud: Sequence[tuple[float, float]] = (),
  published: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
  """Draws top-1 accuracy against compute; rows of one method at several budgets are joined.

  Args:
    rows: Rows of a result, or their JSON in `result.json`; rows without `top1` or `gmacs` are left
      out.
    cloud: GMACs and top-1 of random schedules.
    published: GMACs and top-1 that were not measured here, by source; drawn with open markers.
  """
  figure, axes = subplots(width=9.0 if published else 7.0, height=4.6)
  if cloud:
    axes.plot(*columns(cloud), ".", color="#B0B0B0", markersize=3, zorder=1)
  known = [row if isinstance(row, Row) else Row.from_json(row, "rows") for row in rows]
  shown = [row for row in known if row.top1 is not None and row.gmacs is not None]
  _draw_published(axes, published or {})
  styles = _draw_measured(axes, shown, ", measured" if published else "")
  axes.margins(0.18)
  name_axes(axes, "GMACs per image", "top-1 accuracy (%)")
  axes.ticklabel_format(useOffset=False)
  if published or len(shown) > _MOST_LABELS:
    axes.margins(0.05)
    axes.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
  else:
    label_points(figure, axes, [(*_point(row), row.name, styles[row.series]) for row in shown])
  return figure


def _draw_published(axes: Axes, published: Mapping[str, Sequence[tuple[float, float]]]) -> None:
  for source, points in published.items():
    color, marker, size = _method_style(source, list(published))
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


def _draw_measured(axes: Axes, rows: Sequence[Row], suffix: str) -> dict[str, str]:
  """Draws a line for each series of rows; returns the colours by series."""
  series: dict[str, list[tuple[float, float]]] = {}
  for row in rows:
    series.setdefault(row.series, []).append(_point(row))
  colors = {}
  for index, (name, points) in enumerate(series.items()):
    colors[name], marker, size = _method_style(name, list(series))
    axes.plot(
      *columns(sorted(points)),
      label=f"{name}{suffix}",
      color=colors[name],
      linestyle=LINES[index // len(COLORS) % len(LINES)],
      linewidth=1,
      marker=marker,
      markersize=size,
    )
  return colors


def _point(row: Row) -> tuple[float, float]:
  assert row.gmacs is not None and row.top1 is not None
  return row.gmacs, row.top1


def _method_style(method: str, methods: list[str]) -> tuple[str, str, float]:
  """Returns the colour, the marker and the marker size."""
  if method.startswith("dense"):
    return BLACK, "*", 13
  index = [m for m in methods if not m.startswith("dense")].index(method)
  return COLORS[index % (len(COLORS) - 1)], MARKERS[index % len(MARKERS)], 8
