"""Counts of tokens that a layer keeps: learnt in one of two ways, or taken from a plan."""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.methods.proxy import NOISE, learnt_count
from vitcomp_jax.ops.straight_through import ste_ceil, ste_mask, ste_min


class Choice(NamedTuple):
  """Masks of a layer's two actions over ranks, and the number of tokens that they leave.

  The masks have the gradient of the probability that a rank is kept. They are 1 beyond the tokens
  that enter the layer, as earlier layers dropped the tokens there.
  """

  prune: Array  # f[n] 0 at ranks that pruning drops
  merge: Array  # f[n] 0 at ranks that merging drops; of no effect at pruned ranks
  pruned: Array  # f[] tokens after pruning
  merged: Array  # f[] tokens that merging keeps
  left: Array  # f[] tokens after both, with the gradient of the cost


def candidates(num_patches: int, granularity: int) -> np.ndarray:
  """Returns the candidate counts of patch tokens: n, n - g, ... down to at least 1."""
  return np.arange(num_patches, 0, -granularity)


def expected_count(logits: Float[Array, " c"], options: np.ndarray) -> Float[Array, ""]:
  """Computes the expected number of patch tokens under the softmax of the logits (Eq. 4)."""
  return jnp.sum(jax.nn.softmax(logits) * options.astype(logits.dtype))


def kept_count(expected: Float[Array, ""], num_patches: int) -> Float[Array, ""]:
  """Rounds the expectation up, with a straight-through gradient.

  Rounding errors must not raise an expectation that would be an integer in exact arithmetic, such
  as that of the initial logits.
  """
  return ste_ceil(expected, tolerance=num_patches * NOISE)


def keep_probability(
  logits: Float[Array, " c"], options: np.ndarray, num_prefix: int, num_tokens: int
) -> Float[Array, " n"]:
  """Computes the probability that each rank is kept, i.e. that the chosen count exceeds it."""
  covered = np.arange(num_tokens)[:, None] < options + num_prefix  # [n c]
  return jnp.asarray(covered, logits.dtype) @ jax.nn.softmax(logits)


class LogitCounts(nn.Module):
  """The authors' counts: expectations over candidates under learnt logits, stored in `arch`.

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
  def __call__(self, before: Array, n: int) -> Choice:
    """Returns the choice among `n` tokens, of which earlier layers keep `before`."""
    prune, merge = (
      self._learnt(name, g)
      for name, g in zip(("prune_logits", "merge_logits"), self.granularity, strict=True)
    )
    before = before.astype(prune[1].dtype)
    pruned = jnp.minimum(before, prune[1])
    return Choice(
      _rank_mask(prune[0][:n], prune[1], before),
      _rank_mask(merge[0][:n], merge[1], pruned),
      pruned,
      merge[1],
      ste_min(before, prune[1], merge[1]),
    )

  @nn.nowrap
  def _learnt(self, name: str, granularity: int) -> tuple[Array, Array]:
    """Returns each rank's probability, and the count."""
    options = candidates(self.num_patches, granularity)
    logits = self.variable("arch", name, jnp.zeros, options.shape).value
    if len(options) == 1:  # nothing to learn: skips the backward pass
      logits = jax.lax.stop_gradient(logits)
    count = kept_count(expected_count(logits, options), self.num_patches) + self.num_prefix
    num_tokens = self.num_patches + self.num_prefix
    return keep_probability(logits, options, self.num_prefix, num_tokens), count


class LearntCounts(nn.Module):
  """Counts that are learnt directly, as shares of the patches, in `arch`; see `learnt_count`.

  The layer keeps `merge` tokens. Of the others, those ranked below `prune` are merged, and the rest
  are pruned.

  Attributes:
    num_patches: Patch tokens of the model.
    num_prefix: Prefix tokens of the model.
    actions: What happens to tokens that are not kept: `prune`, `merge`, or `both` (learnt).
  """

  num_patches: int
  num_prefix: int
  actions: str = "both"

  @property
  def merges(self) -> bool:
    """Returns whether any token may be merged."""
    return self.actions != "prune"

  @nn.compact
  def __call__(self, before: Array, n: int) -> Choice:
    """Returns the choice among `n` tokens, of which earlier layers keep `before`."""
    before = before.astype(jnp.float32)
    merge, merged = self._learnt("merge", jnp.asarray(self.num_prefix + 1.0), before, n)
    if self.actions == "both":
      prune, pruned = self._learnt("prune", jax.lax.stop_gradient(merged), before, n)
    elif self.actions == "merge":
      prune, pruned = jnp.ones_like(merge), before
    else:  # `merge` is the count after pruning
      prune, pruned, merge = merge, merged, jnp.ones_like(merge)
    return Choice(prune, merge, pruned, merged, merged)

  @nn.nowrap
  def _learnt(self, name: str, low: Array, high: Array, n: int) -> tuple[Array, Array]:
    share = self.variable("arch", name, jnp.ones, ()).value
    return learnt_count(share, self.num_patches, low, high, self.num_prefix, n)


class GivenCounts(nn.Module):
  """Counts of a plan: variables, so that any plan runs without recompiling, or fixed numbers.

  The collection `arch` holds the counts `prune_keep` and `merge_keep`.

  Attributes:
    fixed: Tokens that pruning and merging keep; None: the variables hold these counts.
  """

  fixed: tuple[int, int] | None = None
  merges: ClassVar[bool] = True

  @nn.compact
  def __call__(self, before: Array, n: int) -> Choice:
    """Returns the choice among `n` tokens, of which earlier layers keep `before`."""
    if self.fixed is None:
      names = "prune_keep", "merge_keep"
      prune, merge = (self.variable("arch", name, jnp.zeros, ()).value for name in names)
    else:
      prune, merge = (jnp.asarray(float(count)) for count in self.fixed)
    pruned = jnp.minimum(before, prune)
    rank = jnp.arange(n, dtype=prune.dtype)
    stays = (rank < prune) | (rank >= before), (rank < merge) | (rank >= pruned)
    prune_mask, merge_mask = (each.astype(prune.dtype) for each in stays)
    return Choice(prune_mask, merge_mask, pruned, merge, jnp.minimum(pruned, merge))


Counts = LogitCounts | LearntCounts | GivenCounts


def _rank_mask(probability: Array, count: Array, stop: Array) -> Array:
  """Returns 0 for ranks in [count, stop), 1 elsewhere; has the probability's gradient if any is 0.

  Ranks from `stop` on were dropped by an earlier mask. They are 1 here, so that the gradient
  reaches that mask, in which they are 0.
  """
  rank = jnp.arange(probability.shape[0], dtype=count.dtype)
  mask = ste_mask(probability, (rank >= count) & (rank < stop))
  return jnp.where(count < stop, mask, 1.0)
