"""DiffRate's reduction by masking: with learnable counts, and with the counts of a plan."""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.methods.diffrate.recipe import OURS, Recipe
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.tokens import AttentionStats, Tokens
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


class Choice(NamedTuple):
  """How many tokens go on, by one of the two actions."""

  probability: Array  # f[n] that the token at each rank is kept
  kept: Array  # f[] tokens that are kept, prefix included


class SearchedCounts(nn.Module):
  """Both counts of a layer as expectations of logits, which are learnt: the collection `arch`.

  Attributes:
    num_patches: Patch tokens of the model.
    num_prefix: Prefix tokens of the model.
    granularity: Distance between candidate counts of pruning and of merging; `num_patches + 1`
      leaves the single candidate that keeps all.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.3 and Eq. 4-6.
  """

  num_patches: int
  num_prefix: int
  granularity: tuple[int, int] = (1, 1)

  @property
  def merges(self) -> bool:
    """Returns whether any token may be merged."""
    return self.granularity[1] <= self.num_patches

  @nn.compact
  def __call__(self) -> tuple[Choice, Choice]:
    """Returns how many tokens pruning keeps, and how many merging."""
    prune, merge = self.granularity
    return self._choice("prune_logits", prune), self._choice("merge_logits", merge)

  @nn.nowrap
  def _choice(self, name: str, granularity: int) -> Choice:
    options = candidates(self.num_patches, granularity)
    logits = self.variable("arch", name, jnp.zeros, options.shape).value
    if len(options) == 1:  # nothing to learn, so that no backward pass has to come here
      logits = jax.lax.stop_gradient(logits)
    count = kept_count(expected_count(logits, options), self.num_patches) + self.num_prefix
    num_tokens = self.num_patches + self.num_prefix
    return Choice(keep_probability(logits, options, self.num_prefix, num_tokens), count)


class ReplayedCounts(nn.Module):
  """Both counts of a layer as variables, so that plans are tried without compiling.

  The collection `arch` holds the counts themselves, `prune_keep` and `merge_keep`.

  Attributes:
    num_patches: Patch tokens of the model.
    num_prefix: Prefix tokens of the model.
  """

  num_patches: int
  num_prefix: int
  merges: ClassVar[bool] = True

  @nn.compact
  def __call__(self) -> tuple[Choice, Choice]:
    """Returns how many tokens pruning keeps, and how many merging."""
    return self._choice("prune_keep"), self._choice("merge_keep")

  @nn.nowrap
  def _choice(self, name: str) -> Choice:
    count = self.variable("arch", name, jnp.zeros, ()).value
    rank = jnp.arange(self.num_patches + self.num_prefix, dtype=count.dtype)
    return Choice((rank < count).astype(count.dtype), count)


class MaskedPruneMerge(nn.Module):
  """`PruneMerge` by masking, with counts that are traced.

  Tokens come out sorted by importance, the dropped ones last.

  Attributes:
    counts: How many tokens go on; its variables stand in this module's scope.
    importance: See `PruneMerge`.
    recipe: How tokens are sorted and merged.
    limit: Tokens that go on, of which the kept ones are the first; None: all, masked or not.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.3 and Eq. 7.
  """

  counts: SearchedCounts | ReplayedCounts
  importance: str = "cls"
  recipe: Recipe = OURS
  limit: int | None = None

  def setup(self) -> None:
    nn.share_scope(self, self.counts)

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    assert stats is not None, "MaskedPruneMerge needs the attention's statistics"
    n = tokens.x.shape[1]
    prune, merge = self.counts()
    before = _before(tokens, self.counts, prune)
    pruned = jnp.minimum(before, prune.kept)
    tokens, keep = self._sorted(tokens, stats)
    keep = keep * _rank_mask(prune.probability[:n], prune.kept, before)[None]
    keep = keep * _rank_mask(merge.probability[:n], merge.kept, pruned)[None]
    rank = jnp.arange(n, dtype=pruned.dtype)[None]
    is_pruned = (rank >= pruned) & (rank < before)
    tokens = tokens.mask(is_pruned, keep, ste_min(before, prune.kept, merge.kept))
    if self.counts.merges:
      tokens = self._merged(tokens, merge.kept, pruned)
    return tokens if self.limit is None else tokens.first(self.limit)

  def count(self, n: int) -> int:
    """Returns the tokens that go on, masked or not."""
    return n if self.limit is None else min(n, self.limit)

  def _sorted(self, tokens: Tokens, stats: AttentionStats) -> tuple[Tokens, Array]:
    """Returns the tokens by falling importance, and the mask that goes with them."""
    importance = IMPORTANCES[self.importance](stats, tokens)
    order = select.importance_order(importance, tokens.num_prefix, tokens.x.shape[1])
    taken = tokens.take(order)
    return taken, taken.kept if self.recipe.mask_follows else tokens.kept

  def _merged(self, tokens: Tokens, start: Array, stop: Array) -> Tokens:
    """Adds the tokens of rank [start, stop) to their receivers; they stay where they are."""
    n, size = tokens.x.shape[1], tokens.sizes
    rank = jnp.arange(n, dtype=start.dtype)[None]
    joins = (rank >= start) & (rank < stop)
    first = jnp.minimum(tokens.num_prefix + (not self.recipe.first_receives), start - 1)
    receives = (rank >= first) & (rank < start)
    scores = jnp.where(receives[:, None], merge.similarity(tokens.x, tokens.x), -jnp.inf)
    receiver, weight = merge.best(scores)
    weight = jnp.ones_like(weight) if self.recipe.whole_sizes else weight
    weight = jnp.where(joins, weight, 0).astype(size.dtype)
    weight = weight if self.recipe.signed_similarity else jnp.maximum(weight, 0)
    joined = merge.joins(receiver, n, tokens.x.dtype) * joins[:, None].astype(tokens.x.dtype)
    total = tokens.x + merge.join(tokens.x, receiver, joins)
    share = size * weight
    if self.recipe.clamp_size:
      share = jnp.where(joins, jnp.maximum(share, 1), 0)
      size = jnp.where(joins, share, size)
    size = size + jnp.einsum("bts,bs->bt", joined.astype(size.dtype), share)
    receiver = jnp.where(joins, receiver, jnp.arange(n, dtype=receiver.dtype)[None])
    mean = total / (1 + jnp.sum(joined, axis=2))[..., None]
    return tokens.merge(mean, jax.lax.stop_gradient(size), receiver)


class HeadOnlyPruneMerge(nn.Module):
  """Counts what a last layer keeps of which only the prefix is left, and removes nothing.

  Attributes:
    counts: As of `MaskedPruneMerge`.
  """

  counts: SearchedCounts

  def setup(self) -> None:
    nn.share_scope(self, self.counts)

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    del stats
    prune, merge = self.counts()
    before = _before(tokens, self.counts, prune)
    return tokens.replace(num_kept=ste_min(before, prune.kept, merge.kept))

  def count(self, n: int) -> int:
    """Returns `n`: the tokens that are there stay."""
    return n


def _before(tokens: Tokens, counts: SearchedCounts | ReplayedCounts, choice: Choice) -> Array:
  """Returns the tokens that earlier layers keep; they alone take the gradient of their count."""
  # Not counted in `keep`: one image's mask would have to reach every device.
  total = counts.num_patches + counts.num_prefix
  before = total if tokens.num_kept is None else jax.lax.stop_gradient(tokens.num_kept)
  return jnp.asarray(before, choice.kept.dtype)


def _rank_mask(probability: Array, count: Array, stop: Array) -> Array:
  """0 for ranks in [count, stop), 1 elsewhere; the probability's gradient, unless none is 0.

  Ranks past `stop` were dropped earlier. They are 1 here: their 0 is the earlier mask's, which
  this one then lets the gradient pass to.
  """
  rank = jnp.arange(probability.shape[0], dtype=count.dtype)
  mask = ste_mask(probability, (rank >= count) & (rank < stop))
  return jnp.where(count < stop, mask, 1.0)
