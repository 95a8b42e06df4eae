"""Makes static layers from the counts that a search learns."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.config import DiffRateOptions
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.methods.diffrate import recipe as recipes
from vitcomp_jax.methods.diffrate.rates import Rates
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.proxy import NOISE
from vitcomp_jax.methods.widths.deployment import slimmed
from vitcomp_jax.methods.widths.factors import LayerFactors
from vitcomp_jax.methods.widths.lists import HIDDEN, QK, VALUE
from vitcomp_jax.models.spec import ViTSpec

_WIDTH_FIELDS = {HIDDEN: "mlp_dim", QK: "head_dim", VALUE: "value_dim"}


@dataclasses.dataclass(frozen=True)
class Deployment:
  """Turns tables of counts, see `methods.diffrate.rates`, into static layers.

  Attributes:
    spec: The model.
    options: Options of the search.
    rates: Rates that the search learns.
    dense: Layers that keep all tokens.
  """

  spec: ViTSpec
  options: DiffRateOptions
  rates: Rates
  dense: Layers

  def whole(self, expected: np.ndarray) -> np.ndarray:
    """Rounds counts up to multiples of the tile, which for tokens include the prefix."""
    rows, first = [], len(self.rates.tokens)
    for i, row in enumerate(expected):
      patches, prefix = self.spec.patches_at(i), self.spec.num_prefix
      counts = [_rounded(n, patches, self.options.tile, prefix) for n in row[:first]]
      for n, units in zip(row[first:], self.rates.widths.values(), strict=True):
        counts.append(_rounded(n, units.length, math.lcm(self.options.tile, units.step)))
      rows.append(counts)
    return np.array(rows, np.float64)

  def layers(self, expected: np.ndarray) -> Layers:
    """Returns static layers that keep the expected counts, rounded up.

    With widths, they equal those of `slimmed` except for the order of rotated pairs.
    """
    layers = []
    for layer, (tokens, units) in zip(self.dense, self._counts(expected), strict=True):
      if tokens:
        layer = dataclasses.replace(layer, reduce=self._reducer(*tokens))
      # Values that are not searched keep their width, whatever the width of the keys becomes.
      changes: dict[str, Any] = {"value_dim": layer.value_width}
      changes |= {_WIDTH_FIELDS[name]: count for name, count in units.items()}
      layers.append(dataclasses.replace(layer, **changes))
    return tuple(layers)

  def _counts(self, expected: np.ndarray) -> list[tuple[list[int], dict[str, int]]]:
    """Returns each layer's integer counts: of tokens, and of units by the name of their list."""
    counts, first = [], len(self.rates.tokens)
    for row in self.whole(expected).astype(int).tolist():
      counts.append((row[:first], dict(zip(self.rates.widths, row[first:], strict=True))))
    return counts

  def _reducer(self, pruned: int, merged: int) -> PruneMerge:
    """Returns the reducer that leaves these numbers of patch tokens after pruning and merging."""
    recipe, prefix = recipes.recipe(self.options.recipe, self.spec), self.spec.num_prefix
    return PruneMerge(
      pruned + prefix,
      merged + prefix,
      signed_similarity=recipe.signed_similarity,
      importance=self.spec.importance(self.options.importance),
      whole_sizes=recipe.whole_sizes,
      first_receives=recipe.first_receives,
    )

  def slimmed(
    self,
    params: Mapping[str, Any],
    expected: np.ndarray,
    factors: Sequence[LayerFactors] | None,
  ) -> tuple[Layers, Mapping[str, Any] | None]:
    """Returns the static layers that keep the expected counts, and their weights.

    Args:
      params: Weights of the dense model.
      expected: Table of counts.
      factors: Sorted lists of the model's units, see `methods.widths.factors.factorise`; None:
        widths are not searched.

    Returns:
      The layers, and their weights; the weights are None if widths are not searched, as those of
      the dense model fit then.
    """
    layers = self.layers(expected)
    if factors is None:
      return layers, None
    units = [counts for _, counts in self._counts(expected)]
    narrow, small = slimmed(self.spec, params, factors, units)
    pairs = zip(narrow, layers, strict=True)
    return tuple(dataclasses.replace(new, reduce=layer.reduce) for new, layer in pairs), small


def _rounded(expected: float, length: int, tile: int, prefix: int = 0) -> int:
  """Rounds a count of a list up so that, with the prefix, it is a multiple of the tile."""
  count = min(max(math.ceil(expected - length * NOISE), 1), length) + prefix
  return min(-(-count // tile) * tile, length + prefix) - prefix
