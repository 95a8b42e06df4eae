"""DiffRate's reduction by masking: with learnable counts, and with the counts of a plan."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.methods.diffrate.recipe import OURS, Recipe
from vitcomp_jax.models.tokens import AttentionStats, Aux, Tokens, mark_pruned
from vitcomp_jax.ops import merge, select
from vitcomp_jax.ops.straight_through import ste_ceil, ste_mask, ste_min

# Float noise of an expected count, relative to the patches: a few units in the last place.
NOISE = 2.0**-22


def candidates(num_patches: int, granularity: int) -> np.ndarray:
  """Kept patch tokens to choose among, most first: n, n - g, ... down to at least 1."""
  return np.arange(num_patches, 0, -granularity)


def expected_count(logits: Float[Array, " c"], options: np.ndarray) -> Float[Array, ""]:
  """The expectation of the kept patch tokens under the softmax of the logits (Eq. 4)."""
  return jnp.sum(jax.nn.softmax(logits) * options.astype(logits.dtype))


def kept_count(expected: Float[Array, ""], num_patches: int) -> Float[Array, ""]:
  """The expectation rounded up, with a straight-through gradient.

  An expectation that is whole in exact arithmetic, such as the start's, may come out a few units
  in the last place higher; it must not be rounded up for that.
  """
  return ste_ceil(expected, tolerance=num_patches * NOISE)


def keep_probability(
  logits: Float[Array, " c"], options: np.ndarray, num_prefix: int, num_tokens: int
) -> Float[Array, " n"]:
  """Probability that the token at each rank is kept: that of choosing a count above its rank."""
  covered = np.arange(num_tokens)[:, None] < options + num_prefix  # [n c]
  return jnp.asarray(covered, logits.dtype) @ jax.nn.softmax(logits)


class PruneMergeSearch(nn.Module):
  """DiffRate's reduction with learnable counts: masks tokens instead of removing them.

  Both counts live in the collection `arch`. Tokens come out sorted by importance, the dropped
  ones last.

  Attributes:
    num_patches: Patch tokens of the model.
    num_prefix: Prefix tokens of the model.
    granularity: Distance between candidate counts of pruning and of merging; `num_patches + 1`
      leaves the single candidate that keeps all.
    importance: See `PruneMerge`.
    recipe: How tokens are sorted and merged.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.3 and Eq. 4-7.
  """

  num_patches: int
  num_prefix: int
  granularity: tuple[int, int] = (1, 1)
  importance: str = "cls"
  recipe: Recipe = OURS

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None, "PruneMergeSearch needs the attention's statistics"
    tokens = self._sorted(tokens, stats)
    n = tokens.x.shape[1]
    assert tokens.keep is not None
    prune_probability, prune_count = self._choice("prune")
    merge_probability, merge_count = self._choice("merge")
    before = self._before(tokens, prune_count.dtype)
    pruned = jnp.minimum(before, prune_count)
    keep = tokens.keep * _rank_mask(prune_probability[:n], prune_count, before)[None]
    rank = jnp.arange(n, dtype=pruned.dtype)[None]
    tokens = mark_pruned(tokens, (rank >= pruned) & (rank < before))
    if self.granularity[1] <= self.num_patches:
      tokens = self._merged(tokens, merge_count, pruned)
    keep = keep * _rank_mask(merge_probability[:n], merge_count, pruned)[None]
    count = ste_min(before, prune_count, merge_count)
    return tokens.replace(keep=keep, num_kept=jax.lax.stop_gradient(count)), Aux(count)

  def count(self, n: int) -> int:
    """Returns `n`: all tokens stay, masked or not."""
    return n

  def _before(self, tokens: Tokens, dtype: jnp.dtype) -> Array:
    # Not counted in `keep`: one image's mask would have to reach every device.
    total = self.num_patches + self.num_prefix
    return jnp.asarray(total if tokens.num_kept is None else tokens.num_kept, dtype)

  def _choice(self, what: str) -> tuple[Array, Array]:
    """The probability that each rank is kept, and the kept count, prefix included."""
    options = candidates(self.num_patches, self.granularity[what == "merge"])
    logits = self.variable("arch", f"{what}_logits", jnp.zeros, options.shape).value
    if len(options) == 1:  # nothing to learn, so that no backward pass has to come here
      logits = jax.lax.stop_gradient(logits)
    count = kept_count(expected_count(logits, options), self.num_patches) + self.num_prefix
    num_tokens = self.num_patches + self.num_prefix
    return keep_probability(logits, options, self.num_prefix, num_tokens), count

  def _sorted(self, tokens: Tokens, stats: AttentionStats) -> Tokens:
    n = tokens.x.shape[1]
    importance = stats.importance(self.importance, tokens)
    ones = jnp.ones(tokens.x.shape[:2], importance.dtype)
    keep = ones if tokens.keep is None else tokens.keep
    order = select.importance_order(importance, tokens.num_prefix, n)
    return tokens.replace(
      x=select.permute(tokens.x, order),
      size=select.take(ones if tokens.size is None else tokens.size, order),
      keep=select.take(keep, order) if self.recipe.mask_follows else keep,
      source=select.follow(tokens.source, order, n),
      place=None if tokens.place is None else select.follow(tokens.place, order, n),
    )

  def _merged(self, tokens: Tokens, start: Array, stop: Array) -> Tokens:
    """Adds the tokens of rank [start, stop) to their receivers; they stay where they are."""
    assert tokens.size is not None
    rank = jnp.arange(tokens.x.shape[1], dtype=start.dtype)[None]
    joins = (rank >= start) & (rank < stop)
    first = jnp.minimum(tokens.num_prefix + (not self.recipe.first_receives), start - 1)
    receives = (rank >= first) & (rank < start)
    scores = jnp.where(receives[:, None], merge.similarity(tokens.x, tokens.x), -jnp.inf)
    receiver, weight = merge.best(scores)
    weight = jnp.ones_like(weight) if self.recipe.whole_sizes else weight
    weight = jnp.where(joins, weight, 0).astype(tokens.size.dtype)
    weight = weight if self.recipe.signed_similarity else jnp.maximum(weight, 0)
    joined = merge.joins(receiver, rank.size, tokens.x.dtype)
    joined = joined * joins[:, None].astype(joined.dtype)
    total = tokens.x + merge.join(tokens.x, receiver, joins)
    size, share = tokens.size, tokens.size * weight
    if self.recipe.clamp_size:
      share = jnp.where(joins, jnp.maximum(share, 1), 0)
      size = jnp.where(joins, share, size)
    size = size + jnp.einsum("bts,bs->bt", joined.astype(size.dtype), share)
    return tokens.replace(
      x=total / (1 + jnp.sum(joined, axis=2))[..., None],
      size=jax.lax.stop_gradient(size),
      source=_follow_join(tokens.source, receiver, joins[0]),
    )


class PruneMergeCounts(PruneMergeSearch):
  """The counts of a last layer of which only the prefix is left: no token needs to be masked."""

  @nn.compact
  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    (_, prune_count), (_, merge_count) = self._choice("prune"), self._choice("merge")
    before = self._before(tokens, prune_count.dtype)
    return tokens, Aux(ste_min(before, prune_count, merge_count))


class PruneMergeMasked(PruneMergeSearch):
  """`PruneMerge` by masking: its counts are variables, so that plans are tried without compiling.

  The collection `arch` holds the counts themselves, `prune_keep` and `merge_keep`.

  Attributes:
    limit: Tokens that go on, of which the kept ones are the first; None: all, masked or not.
  """

  limit: int | None = None

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    tokens, aux = super().__call__(tokens, stats)
    if self.limit is not None:  # The others hold no patches any more.
      parts = {k: getattr(tokens, k)[:, : self.limit] for k in ("x", "size", "keep")}
      tokens = tokens.replace(**parts)
    return tokens, aux

  def count(self, n: int) -> int:
    return n if self.limit is None else min(n, self.limit)

  def _choice(self, what: str) -> tuple[Array, Array]:
    count = self.variable("arch", f"{what}_keep", jnp.zeros, ()).value
    rank = jnp.arange(self.num_patches + self.num_prefix, dtype=count.dtype)
    return (rank < count).astype(count.dtype), count


def _rank_mask(probability: Array, count: Array, stop: Array) -> Array:
  """0 for ranks in [count, stop), 1 elsewhere; the probability's gradient, unless none is 0.

  Ranks past `stop` were dropped earlier. They are 1 here: their 0 is the earlier mask's, which
  this one then lets the gradient pass to.
  """
  rank = jnp.arange(probability.shape[0], dtype=count.dtype)
  mask = ste_mask(probability, (rank >= count) & (rank < stop))
  return jnp.where(count < stop, mask, 1.0)


def _follow_join(source: Array, receiver: Array, joins: Array) -> Array:
  position = jnp.maximum(source, 0)
  moved = jnp.take_along_axis(receiver, position, axis=1)
  return jnp.where((source >= 0) & joins[position], moved, source)
