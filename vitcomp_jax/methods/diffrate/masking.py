"""DiffRate's reduction by masking, with learnable counts or the counts of a plan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.methods.diffrate.counts import Choice, Counts
from vitcomp_jax.methods.diffrate.recipe import OURS, Recipe
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops import merge, select


class MaskedPruneMerge(nn.Module):
  """`PruneMerge` by masking, with traced counts.

  It sorts tokens by importance, and puts the dropped ones last.

  Attributes:
    counts: Module that computes the counts; its variables are in this module's scope.
    importance: Importance metric, see `PruneMerge`.
    recipe: Details of sorting and merging.
    limit: Number of tokens to pass on, at least the kept ones; None: all, masked or not.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.3 and Eq. 7.
  """

  counts: Counts
  importance: str = "cls"
  recipe: Recipe = OURS
  limit: int | None = None

  def setup(self) -> None:
    nn.share_scope(self, self.counts)

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    assert stats is not None, "MaskedPruneMerge needs the attention's statistics"
    n = tokens.x.shape[1]
    before = _before(tokens)
    choice = self.counts(before, n)
    taken, keep, order = self._sorted(tokens, stats)
    prune, merges = self._masks(choice, before, tokens, stats, order)
    entering = keep * prune
    rank = jnp.arange(n, dtype=before.dtype)[None]
    is_pruned = (rank >= choice.pruned) & (rank < before)
    taken = taken.mask(is_pruned, entering * merges, choice.left)
    if self.counts.merges:
      taken = self._merged(taken, entering * (1 - merges), choice)
    return taken if self.limit is None else taken.first(self.limit)

  def count(self, n: int) -> int:
    """Returns the number of tokens passed on, masked or not."""
    return n if self.limit is None else min(n, self.limit)

  def _importance(self, tokens: Tokens, stats: AttentionStats) -> Array:
    return IMPORTANCES[self.importance](stats, tokens)

  def _sorted(self, tokens: Tokens, stats: AttentionStats) -> tuple[Tokens, Array, Array]:
    """Returns the tokens by decreasing importance, their mask, and their order."""
    importance = self._importance(tokens, stats)
    order = select.importance_order(importance, tokens.num_prefix, tokens.x.shape[1])
    taken = tokens.take(order)
    return taken, taken.kept if self.recipe.mask_follows else tokens.kept, order

  def _masks(
    self, choice: Choice, before: Array, tokens: Tokens, stats: AttentionStats, order: Array
  ) -> tuple[Array, Array]:
    """Returns the masks of pruning and merging, f[#b n], for the tokens in their new order."""
    prune, merges = choice.prune[None], choice.merge[None]
    if not self.recipe.learns_shares:
      return prune, merges
    importance = self._importance(tokens.replace(keep=None), stats.replace(keep=None))
    rank = jnp.arange(order.shape[1])[None]
    importance = jnp.where(rank < tokens.num_prefix, jnp.inf, select.take(importance, order))
    return (
      _as_if_kept(prune, importance, before, choice.pruned, before),
      _as_if_kept(merges, importance, before, choice.merged, choice.pruned),
    )

  def _merged(self, tokens: Tokens, joining: Array, choice: Choice) -> Tokens:
    """Merges tokens into their receivers, but leaves them in place.

    Args:
      tokens: The tokens.
      joining: 1 for each token to merge, f[b n].
      choice: The layer's counts.
    """
    n, size = tokens.x.shape[1], tokens.sizes
    start = choice.merged
    rank = jnp.arange(n, dtype=start.dtype)[None]
    joins = (rank >= start) & (rank < choice.pruned)
    first = jnp.minimum(tokens.num_prefix + (not self.recipe.first_receives), start - 1)
    receives = (rank >= first) & (rank < start)
    # A kept token is not its own receiver: if it were merged, it would join another token.
    may = receives[:, None] & ~jnp.eye(n, dtype=bool)[None]
    scores = jnp.where(may, merge.similarity(tokens.x, tokens.x), -2.0)
    receiver, weight = merge.best(scores)
    weight = jnp.ones_like(weight) if self.recipe.whole_sizes else weight
    weight = weight if self.recipe.signed_similarity else jnp.maximum(weight, 0)
    if not self.recipe.learns_shares:
      joining = jnp.broadcast_to(joins, size.shape).astype(size.dtype)
    total = tokens.x + merge.join(tokens.x, receiver, joining)
    joined = merge.joins(receiver, n, size.dtype)
    share = size * weight.astype(size.dtype)
    if self.recipe.clamp_size:
      share = jnp.maximum(share, 1)
      size = jnp.where(joins, share, size)
    size = size + jnp.einsum("bts,bs->bt", joined, share * joining)
    count = 1 + jnp.einsum("bts,bs->bt", joined, joining)
    mean = total / count[..., None].astype(total.dtype)
    receiver = jnp.where(joins, receiver, jnp.arange(n, dtype=receiver.dtype)[None])
    size = size if self.recipe.learns_shares else jax.lax.stop_gradient(size)
    return tokens.merge(mean, size, receiver)


class HeadOnlyPruneMerge(nn.Module):
  """Computes the counts of a last layer that passes on only the prefix, and removes nothing.

  Attributes:
    counts: Module that computes the counts, as in `MaskedPruneMerge`.
  """

  counts: Counts

  def setup(self) -> None:
    nn.share_scope(self, self.counts)

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    del stats
    return tokens.replace(num_kept=self.counts(_before(tokens), tokens.x.shape[1]).left)

  def count(self, n: int) -> int:
    """Returns `n`: no token is removed."""
    return n


def _as_if_kept(mask: Array, importance: Array, before: Array, count: Array, stop: Array) -> Array:
  """Masks the tokens that earlier layers dropped as this layer would have, had they been kept.

  Their mask matters only for the gradient of earlier counts. One more token in an earlier layer is
  among the least important ones, and mostly stays only until the next layer drops it.

  Args:
    mask: Mask of the tokens that enter, by rank, f[1 n].
    importance: Importance of all tokens, those that enter first, f[b n].
    before: Number of tokens that enter.
    count: Number of tokens that the mask keeps.
    stop: Number of tokens to which the mask is applied.

  Returns:
    The mask of all tokens, f[b n].
  """
  rank = jnp.arange(importance.shape[1], dtype=before.dtype)[None]
  least = jnp.min(jnp.where(rank < count, importance, jnp.inf), axis=1, keepdims=True)
  passes = (importance >= least) | (count >= stop)
  return jnp.where(rank >= before, passes.astype(mask.dtype), mask)


def _before(tokens: Tokens) -> Array:
  """Returns the number of tokens that earlier layers keep, without a gradient."""
  # Not the sum of `keep`, which would broadcast one image's mask to every device.
  before = float(tokens.x.shape[1]) if tokens.num_kept is None else tokens.num_kept
  return jax.lax.stop_gradient(jnp.asarray(before))
