"""Plots of the units that ViT-Slim keeps and of its masks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from vitcomp_jax.reporting.plots.style import (
  BLUE,
  COLORS,
  SMALL,
  TITLE,
  name_axes,
  new_figure,
  subplots,
)

_CUT_AND_KEPT = ListedColormap(["#D0D0D0", BLUE])


def mask_histograms(records: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> Figure:
  """Draws the distribution of the soft masks over the steps of ViT-Slim's search.

  Args:
    records: Logged metrics, with `step` and a histogram of each searched kind of mask.
    limits: Lower end of the first bin and upper end of the last.
  """
  names = {"attn": "attention", "mlp": "hidden units", "patch": "patches"}
  kinds = [kind for kind in names if any(f"{kind}_histogram" in r for r in records)]
  figure, _ = subplots(width=7.0, height=2.4 * len(kinds), rows=len(kinds))
  for axes, kind in zip(figure.axes, kinds, strict=True):
    found = [r for r in records if f"{kind}_histogram" in r]
    shares = np.array([r[f"{kind}_histogram"] for r in found], float)
    shares /= shares.sum(axis=1, keepdims=True)
    steps = [0, *(r["step"] for r in found)]
    edges = np.linspace(limits[0], limits[1], shares.shape[1] + 1)
    filled = np.flatnonzero(shares.any(axis=0))
    axes.set_ylim(edges[filled[0]], edges[filled[-1] + 1])
    mesh = axes.pcolormesh(steps, edges, 100 * shares.T, cmap="Blues", norm=LogNorm(0.1, 100))
    figure.colorbar(mesh, ax=axes, label="share (%)", format="%g", pad=0.02)
    name_axes(axes, "step" if kind == kinds[-1] else "", f"masks: {names[kind]}")
  return figure


def kept_widths(kept: Mapping[str, Sequence[float]]) -> Figure:
  """Draws the shares of units that each slimmed layer keeps.

  Args:
    kept: Kept share in each layer, by kind of unit, such as hidden units.
  """
  depth = max(map(len, kept.values()))
  figure, axes = subplots(width=max(7.0, 0.5 * depth + 1.5), height=4.0)
  for index, (name, shares) in enumerate(kept.items()):
    x = [layer + 0.25 * (index - (len(kept) - 1) / 2) for layer in range(1, depth + 1)]
    color, hatch = COLORS[index], ("", "//", "..")[index % 3]
    percent = [100 * share for share in shares]
    axes.bar(x, percent, 0.22, color=color, hatch=hatch, edgecolor="white", label=name)
  axes.set_ylim(0, 105)
  axes.set_xticks(range(1, depth + 1))
  name_axes(axes, "layer", "kept (%)")
  axes.legend(fontsize=SMALL, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
  return figure


def kept_units(attn: np.ndarray, mlp: np.ndarray) -> Figure:
  """Draws the units that each slimmed layer keeps: the masks after the cut.

  Args:
    attn: Kept dimensions of each head, bool[l h k].
    mlp: Kept hidden units, bool[l m].
  """
  depth, heads, dims = attn.shape
  figure = new_figure(7.0, 2 * (0.19 * depth + 0.9))
  panels = (
    (attn.reshape(depth, heads * dims), f"{heads} heads of {dims} dimensions"),
    (mlp, f"{mlp.shape[1]} hidden units"),
  )
  for axes, (kept, name) in zip(figure.subplots(2, 1), panels, strict=True):
    axes.imshow(kept, cmap=_CUT_AND_KEPT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(depth), [str(layer) for layer in range(1, depth + 1)], fontsize=SMALL)
    axes.set_yticks(np.arange(depth + 1) - 0.5, minor=True)
    axes.grid(True, axis="y", which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.set_ylabel("layer", fontsize=TITLE)
    axes.set_xlabel(f"{name}, {100 * kept.mean():.1f} % kept (blue)", fontsize=TITLE)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
  for head in range(1, heads):
    figure.axes[0].axvline(head * dims - 0.5, color="black", linewidth=1.2)
  return figure


def kept_patches(kept: Sequence[np.ndarray], grid: tuple[int, int]) -> Figure:
  """Draws the patches that each layer keeps.

  Args:
    kept: Kept patches of each layer, row by row, bool[p].
    grid: Rows and columns of patches.
  """
  columns = min(len(kept), 6)
  rows = math.ceil(len(kept) / columns)
  figure = new_figure(1.5 * columns, 1.75 * rows)
  for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
    if index >= len(kept):
      axes.set_axis_off()
      continue
    cells = kept[index].reshape(grid)
    axes.pcolormesh(cells, cmap=_CUT_AND_KEPT, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"layer {index + 1}: {int(kept[index].sum())}", fontsize=SMALL)
  return figure
