"""Plots of the tokens that plans keep, layer by layer."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.style import (
  COLORS,
  GRAY,
  LINES,
  MARKERS,
  SMALL,
  columns,
  name_axes,
  subplots,
)


def tokens_left(
  counts: Sequence[Sequence[int]], num_tokens: int | None = None
) -> list[tuple[int, int]]:
  """Computes the tokens left after each layer; a count above the tokens left has no effect.

  Args:
    counts: `prune_keep` and `merge_keep` of each layer.
    num_tokens: Tokens before the first layer; None: the first layer's `prune_keep`.

  Returns:
    Tokens after pruning and after merging, per layer.
  """
  left, n = [], num_tokens
  for prune_keep, merge_keep in counts:
    pruned = prune_keep if n is None else min(n, prune_keep)
    n = min(pruned, merge_keep)
    left.append((pruned, n))
  return left


def schedules(plans: Mapping[str, Sequence[tuple[int, int]]], num_tokens: int) -> Figure:
  """Draws the tokens that each layer keeps.

  Args:
    plans: `prune_keep` and `merge_keep` of each layer, prefix included, by plan name.
    num_tokens: Tokens before the first layer.
  """
  depth = max(map(len, plans.values()), default=1)
  figure, axes = subplots(width=max(7.0, 0.32 * depth + 1.5), height=4.2)
  axes.axhline(num_tokens, color=GRAY, linewidth=0.9, label=f"dense ({num_tokens})")
  for index, (name, counts) in enumerate(plans.items()):
    _draw_plan(axes, index, name, tokens_left(counts, num_tokens), num_tokens)
  for fill, what in (("none", "after pruning"), (GRAY, "after merging")):
    axes.plot([], [], "o", color=GRAY, markerfacecolor=fill, markersize=5, label=what)
  axes.set_xlim(0.4, depth + 0.6)
  axes.set_ylim(0, num_tokens * 1.06)
  axes.set_xticks(range(1, depth + 1, 1 if depth <= 26 else 2))
  name_axes(axes, "layer", "tokens, prefix included")
  axes.legend(fontsize=SMALL, loc="best", framealpha=0.9)
  return figure


def _draw_plan(
  axes: Axes, index: int, name: str, left: Sequence[tuple[int, int]], num_tokens: int
) -> None:
  """Draws a staircase, with one step down where a layer prunes and another where it merges."""
  color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
  x, y, n = [0.5], [num_tokens], num_tokens
  drops: dict[str, list[tuple[float, int]]] = {"none": [], color: []}
  for layer, (pruned, merged) in enumerate(left, 1):
    for at, count, fill in ((layer - 0.2, pruned, "none"), (layer + 0.2, merged, color)):
      x.append(at)
      y.append(count)
      if count < n:
        drops[fill].append((at, count))
      n = count
  x.append(len(left) + 0.5)
  y.append(n)
  line = LINES[index % len(LINES)]
  width, size = 2.4 - 0.4 * min(index, 2), 7.5 - 1.3 * min(index, 2)
  axes.plot(x, y, color=color, linestyle=line, linewidth=width, drawstyle="steps-post", label=name)
  for fill, points in drops.items():
    face = "white" if fill == "none" else fill
    axes.plot(*columns(points), marker, color=color, markerfacecolor=face, markersize=size)
