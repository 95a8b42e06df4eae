"""DiffRate's static reduction: prunes the least important tokens, then merges."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.reducers import StaticReducer
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops import merge, select


def reduction(spec: ViTSpec, importance: str) -> Callable[[int, int], "PruneMerge"]:
  """Returns a function that makes a reduction from the tokens after pruning and after merging.

  Args:
    spec: The model.
    importance: Value of `config.search.importance`, see `ViTSpec.importance`.
  """
  metric = spec.importance(importance, "config.search.importance")
  return functools.partial(PruneMerge, importance=metric)


@dataclasses.dataclass(frozen=True)
class PruneMerge(StaticReducer):
  """DiffRate's reduction: keeps the most important tokens, then merges the least important.

  Counts include the prefix. A count above the number of remaining tokens has no effect, as in the
  authors' code: some of their schedules are not monotone.

  Attributes:
    prune_keep: Tokens after pruning.
    merge_keep: Tokens after merging.
    signed_similarity: Option of `Recipe`; likewise `whole_sizes` and `first_receives`.
    importance: Importance metric, see `models.importance`.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.2 and Fig. 3a.
  """

  type_name = "prune_merge"

  prune_keep: int
  merge_keep: int
  signed_similarity: bool = False
  importance: str = "cls"
  whole_sizes: bool = False
  first_receives: bool = True

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    assert stats is not None, "PruneMerge needs the attention's statistics"
    n = tokens.x.shape[1]
    pruned, merged = min(n, self.prune_keep), self.count(n)
    if merged < n:
      importance = IMPORTANCES[self.importance](stats, tokens)
      tokens = tokens.take(select.importance_order(importance, tokens.num_prefix, pruned))
    return self._merge_last(tokens, merged) if merged < pruned else tokens

  def count(self, n: int) -> int:
    return min(n, self.prune_keep, self.merge_keep)

  def counts(self, n: int) -> tuple[int, int]:
    """Returns the configured counts; some published ones exceed `n`."""
    return self.prune_keep, self.merge_keep

  def _merge_last(self, tokens: Tokens, keep: int) -> Tokens:
    first = min(tokens.num_prefix + (not self.first_receives), keep - 1)
    receiver, weight = merge.receivers(tokens.x, keep, first)
    weight = weight if self.signed_similarity else jnp.maximum(weight, 0)
    weight = jnp.ones_like(weight) if self.whole_sizes else weight
    size = tokens.sizes
    x, size = merge.merge_tail(tokens.x, size, receiver, weight.astype(size.dtype))
    return tokens.merge(x, size, receiver)
