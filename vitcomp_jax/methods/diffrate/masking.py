"""DiffRate's reduction as masking, with learnable counts or the counts of a plan."""

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

# Rounding error of an expected count, relative to the patches: a few units in the last place.
NOISE = 2.0**-22


def candidates(num_patches: int, granularity: int) -> np.ndarray:
  """Returns the candidate counts of patch tokens: n, n - g, ... down to at least 1."""
  return np.arange(num_patches, 0, -granularity)


def expected_count(logits: Float[Array, " c"], options: np.ndarray) -> Float[Array, ""]:
  """Computes the expected number of patch tokens under the softmax of the logits (Eq. 4)."""
  return jnp.sum(jax.nn.softmax(logits) * options.astype(logits.dtype))


def kept_count(expected: Float[Array, ""], num_patches: int) -> Float[Array, ""]:
  """Rounds the expectation up, with a straight-through gradient.

  Rounding errors must not round up an expectation that is an integer in exact arithmetic, such as
  that of the initial logits.
  """
  return ste_ceil(expected, tolerance=num_patches * NOISE)


def keep_probability(
  logits: Float[Array, " c"], options: np.ndarray, num_prefix: int, num_tokens: int
) -> Float[Array, " n"]:
  """Computes the probability that each rank is kept: that the chosen count exceeds the rank."""
  covered = np.arange(num_tokens)[:, None] < options + num_prefix  # [n c]
  return jnp.asarray(covered, logits.dtype) @ jax.nn.softmax(logits)


class Choice(NamedTuple):
  """Tokens that one of the two actions keeps."""

  probability: Array  # f[n] that each rank is kept
  kept: Array  # f[] tokens that are kept, prefix included


class SearchedCounts(nn.Module):
  """Both counts of a layer as expectations under learnt logits, the collection `arch`.

  Attributes:
    num_patches: Patch tokens of the model.
    num_prefix: Prefix tokens of the model.
    granularity: Distance between candidate counts, for pruning and merging; `num_patches + 1`
      leaves a single candidate that keeps all.

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
    if len(options) == 1:  # nothing to learn: spares the backward pass
      logits = jax.lax.stop_gradient(logits)
    count = kept_count(expected_count(logits, options), self.num_patches) + self.num_prefix
    num_tokens = self.num_patches + self.num_prefix
    return Choice(keep_probability(logits, options, self.num_prefix, num_tokens), count)


class ReplayedCounts(nn.Module):
  """Both counts of a layer as variables, so that plans run without recompiling.

  The collection `arch` holds the counts `prune_keep` and `merge_keep`.

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
  """`PruneMerge` as masking, with traced counts.

  Its tokens are sorted by importance, the dropped ones last.

  Attributes:
    counts: Module that computes the counts; its variables are in this module's scope.
    importance: Importance metric, see `PruneMerge`.
    recipe: Details of sorting and merging.
    limit: Number of tokens to pass on, at least the kept ones; None: all, masked or not.

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
    """Returns the number of tokens passed on, masked or not."""
    return n if self.limit is None else min(n, self.limit)

  def _sorted(self, tokens: Tokens, stats: AttentionStats) -> tuple[Tokens, Array]:
    """Returns the tokens by falling importance, and their mask."""
    importance = IMPORTANCES[self.importance](stats, tokens)
    order = select.importance_order(importance, tokens.num_prefix, tokens.x.shape[1])
    taken = tokens.take(order)
    return taken, taken.kept if self.recipe.mask_follows else tokens.kept

  def _merged(self, tokens: Tokens, start: Array, stop: Array) -> Tokens:
    """Merges the tokens of rank [start, stop) into their receivers, leaving them in place."""
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
  """Computes the counts of a last layer that passes on only the prefix, and removes nothing.

  Attributes:
    counts: Module that computes the counts, as in `MaskedPruneMerge`.
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
    """Returns `n`: no token is removed."""
    return n


def _before(tokens: Tokens, counts: SearchedCounts | ReplayedCounts, choice: Choice) -> Array:
  """Returns the number of tokens that earlier layers keep, without a gradient."""
  # Not the sum of `keep`, which would broadcast one image's mask to every device.
  total = counts.num_patches + counts.num_prefix
  before = total if tokens.num_kept is None else jax.lax.stop_gradient(tokens.num_kept)
  return jnp.asarray(before, choice.kept.dtype)


def _rank_mask(probability: Array, count: Array, stop: Array) -> Array:
  """Returns 0 for ranks in [count, stop), 1 elsewhere; has the probability's gradient if any is 0.

  Ranks past `stop` were dropped earlier. They are 1 here, so that the gradient reaches the earlier
  mask, which has their 0.
  """
  rank = jnp.arange(probability.shape[0], dtype=count.dtype)
  mask = ste_mask(probability, (rank >= count) & (rank < stop))
  return jnp.where(count < stop, mask, 1.0)
