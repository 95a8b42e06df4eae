"""Schedules from which a search may start, each with a strength that moves it onto a budget."""

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
_MERGED = 0.5  # of the tokens that a layer removes
# By what is searched: the shapes, and what widths lose relative to what the tokens lose.
_TRIED: Mapping[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
  "tokens": (tuple(_SHAPES), (0.0,)),
  "widths": (("flat",), (1.0,)),
  "both": (("linear", "s_shaped"), (0.0, 0.3, 0.8)),
}


def starts(rates: ShareRates) -> dict[str, Callable[[float], np.ndarray]]:
  """Returns tables of counts by name, each a function of a strength from 0 on."""
  found: dict[str, Callable[[float], np.ndarray]] = {}
  names, shares = _TRIED[rates.options.what]
  for share in shares:
    for name in names:
      label = f"{name}, widths {share:g}" if rates.widths else name
      found[label] = functools.partial(_table, rates, _SHAPES[name], share)
  return found


def _table(
  rates: ShareRates, shape: Callable[[np.ndarray], np.ndarray], share: float, strength: float
) -> np.ndarray:
  depth = rates.spec.depth
  table = rates.lengths * (1 - share * strength)
  if rates.tokens:
    lost = shape(np.arange(1, depth + 1) / depth)
    merged = rates.lengths[:, 0] * (1 - strength * lost)
    before = np.concatenate([rates.lengths[:1, 0], merged[:-1]])
    table[:, 1] = merged
    table[:, 0] = merged + _MERGED * np.maximum(before - merged, 0)
  return rates.clipped(table)
