"""Plots of the progress of a search."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from vitcomp_jax.reporting.plots.style import (
  BLACK,
  BLUE,
  GREEN,
  SMALL,
  VERMILION,
  columns,
  name_axes,
  number,
  subplots,
)


def search_curves(
  records: Sequence[Mapping[str, Any]],
  targets: Sequence[float],
  key: str = "gmacs",
  label: str = "GMACs per image",
) -> Figure:
  """Draws loss and cost over the steps of a search.

  Args:
    records: Logged metrics, with `step`, `loss`, `task_loss` and the cost.
    targets: Budget at each record.
    key: Key of the cost in a record.
    label: Name and unit of the cost.
  """
  figure, losses = subplots(width=7.0, height=5.4, rows=2)
  compute = figure.axes[1]
  dot = "." if len(records) <= 60 else ""
  values: list[float] = []
  for name, what, color, line in (
    ("loss", "loss with the budget term", BLUE, "-"),
    ("task_loss", "task loss", VERMILION, (0, (4, 1.2))),
  ):
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    values += [value for _, value in points]
    if points:
      losses.plot(*columns(points), color=color, ls=line, marker=dot, lw=1.5, label=what)
  if values and 0 < 20 * min(values) < max(values):
    losses.set_yscale("log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    losses.yaxis.set_minor_formatter(NullFormatter())
  points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
  compute.plot(*columns(points), color=GREEN, marker=dot, lw=1.8, label="this step's plan")
  budget = f"budget ({', '.join(map(number, dict.fromkeys(targets)))})"
  limits = columns([(r["step"], target) for r, target in zip(records, targets, strict=True)])
  dashes = (0, (6, 3))
  compute.plot(*limits, color=BLACK, ls=dashes, lw=1.2, label=budget, drawstyle="steps-pre")
  name_axes(losses, "", "loss")
  name_axes(compute, "step", label)
  compute.xaxis.set_major_locator(MaxNLocator(integer=True))
  for axes in (losses, compute):
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=SMALL, loc="best", framealpha=0.9)
  return figure
