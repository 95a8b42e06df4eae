"""Schedules from which a search may start, each with a strength that adjusts it to a budget."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from vitcomp_jax.methods.diffrate.rates import ShareRates

# Share of the patch tokens lost after a layer at strength 1, as a function of its relative depth.
# Higher strengths leave a single token from some layer on.
_SHAPES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
  "linear": lambda depth: depth,
  "flat": lambda depth: np.ones_like(depth),
  "early": np.sqrt,
  "late": np.square,
  "s_shaped": lambda depth: depth**2 * (3 - 2 * depth),  # like the published schedules
}
# The largest strength tried, times the depth. It leaves one element in almost every list.
STRONGEST = 4.0
_MERGED = 0.5  # share of the removed tokens that is merged, by default


@dataclasses.dataclass(frozen=True)
class _Start:
  """A kind of schedule.

  Attributes:
    shape: How tokens fall with the depth, a key of `_SHAPES`.
    merged: Share of the removed tokens that is merged; the rest is pruned.
    widths: How much the widths lose, relative to the strength.
  """

  shape: str
  merged: float = _MERGED
  widths: float = 0.0


_TRIED = {
  "tokens": (
    _Start("linear"),
    _Start("flat", merged=0.0),
    *map(_Start, ("early", "late", "s_shaped")),
    _Start("linear", merged=1.0),  # like ToMe
    _Start("flat", merged=1.0),
  ),
  "widths": (_Start("flat", widths=1.0),),
  "both": tuple(
    _Start(shape, widths=widths) for widths in (0.0, 0.3, 0.8) for shape in ("linear", "s_shaped")
  ),
}


def starts(rates: ShareRates) -> dict[str, Callable[[float], np.ndarray]]:
  """Returns tables of counts by name, each as a function of a strength of at least 0."""
  found: dict[str, Callable[[float], np.ndarray]] = {}
  for start in _TRIED[rates.options.what]:
    merges = {0.0: ", pruned", 1.0: ", merged"}.get(start.merged, "")
    widths = f", widths {start.widths:g}" if rates.widths else ""
    found[f"{start.shape}{merges}{widths}"] = functools.partial(_table, rates, start)
  return found


def _table(rates: ShareRates, start: _Start, strength: float) -> np.ndarray:
  depth = rates.spec.depth
  table = rates.lengths * (1 - start.widths * strength)
  if rates.tokens:
    lost = _SHAPES[start.shape](np.arange(1, depth + 1) / depth)
    merged = rates.lengths[:, 0] * (1 - strength * lost)
    before = np.concatenate([rates.lengths[:1, 0], merged[:-1]])
    table[:, 1] = merged
    if start.merged < 1:  # otherwise all tokens that enter pass pruning
      table[:, 0] = merged + start.merged * np.maximum(before - merged, 0)
  return rates.clipped(table)
