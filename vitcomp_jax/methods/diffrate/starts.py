"""Schedules from which a search may start, each with a strength that moves it onto a budget."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from vitcomp_jax.methods.diffrate.rates import ShareRates

# Share of its patch tokens that a layer loses at strength 1, by the share of the depth done.
# Stronger ones leave a single token from some layer on.
_SHAPES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
  "linear": lambda depth: depth,
  "flat": lambda depth: np.ones_like(depth),
  "early": np.sqrt,
  "late": np.square,
  "s_shaped": lambda depth: depth**2 * (3 - 2 * depth),  # as the published schedules
}
# Strength at which all of them keep next to nothing, for each layer of the model.
STRONGEST = 4.0
_MERGED = 0.5  # of the tokens that a layer removes, if not all are merged


@dataclasses.dataclass(frozen=True)
class _Start:
  """A kind of schedule.

  Attributes:
    shape: How tokens fall with the depth, a key of `_SHAPES`.
    merged: Share of the removed tokens that is merged; the rest is pruned.
    widths: What widths lose, relative to what the tokens lose.
  """

  shape: str
  merged: float = _MERGED
  widths: float = 0.0


_TRIED = {
  "tokens": (
    _Start("linear"),
    _Start("flat", merged=0.0),
    *map(_Start, ("early", "late", "s_shaped")),
    _Start("linear", merged=1.0),  # as ToMe
    _Start("flat", merged=1.0),
  ),
  "widths": (_Start("flat", widths=1.0),),
  "both": tuple(
    _Start(shape, widths=widths) for widths in (0.0, 0.3, 0.8) for shape in ("linear", "s_shaped")
  ),
}


def starts(rates: ShareRates) -> dict[str, Callable[[float], np.ndarray]]:
  """Returns tables of counts by name, each a function of a strength from 0 on."""
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
    if start.merged < 1:  # of all that enter, however many these are
      table[:, 0] = merged + start.merged * np.maximum(before - merged, 0)
  return rates.clipped(table)
