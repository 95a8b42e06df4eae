"""Static reducers: frozen dataclasses of plain values, at once jit key and JSON."""

import dataclasses

import jax.numpy as jnp

from vitcomp_jax.models.tokens import AttentionStats, Aux, TokenReducer, Tokens
from vitcomp_jax.ops import merge, select


@dataclasses.dataclass(frozen=True)
class KeepAll:
  """Removes nothing."""

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    return tokens, Aux(tokens.x.shape[1])

  def count(self, n: int) -> int:
    return n


@dataclasses.dataclass(frozen=True)
class KeepPositions:
  """Keeps the tokens at fixed positions, the same for every image.

  Attributes:
    positions: Of the model's input tokens, ascending; all of the prefix is among them.
  """

  positions: tuple[int, ...]

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    n, prefix = tokens.x.shape[1], tokens.num_prefix
    patches = jnp.array(self.positions[prefix:], jnp.int32) - prefix
    # Where those patches are by now: earlier layers may have dropped others.
    order = jnp.concatenate(
      [
        jnp.broadcast_to(jnp.arange(prefix), (tokens.x.shape[0], prefix)),
        tokens.source[:, patches],
      ],
      axis=1,
    )
    tokens = tokens.replace(
      x=select.take(tokens.x, order),
      size=None if tokens.size is None else select.take(tokens.size, order),
      keep=None if tokens.keep is None else select.take(tokens.keep, order),
      source=select.follow(tokens.source, order, n),
    )
    return tokens, Aux(len(self.positions))

  def count(self, n: int) -> int:
    return min(n, len(self.positions))


@dataclasses.dataclass(frozen=True)
class PruneMerge:
  """DiffRate's reduction: keeps the most important tokens, then merges the least important.

  Counts include the prefix. A count above the tokens that are there does nothing, so that the
  authors' schedules, some of which are not monotone, mean what they mean there.

  Attributes:
    prune_keep: Tokens after pruning.
    merge_keep: Tokens after merging.
    signed_similarity: Add joining sizes times the similarity even where it is negative, as the
      authors do; otherwise times max(similarity, 0), so that no size can shrink below its own.
    always_sort: Sort by importance even where nothing is removed, as the authors do. It changes
      the order of the tokens and nothing else.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.2 and Fig. 3a.
  """

  prune_keep: int
  merge_keep: int
  signed_similarity: bool = False
  always_sort: bool = False

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None, "PruneMerge needs the attention's statistics"
    n = tokens.x.shape[1]
    pruned, merged = min(n, self.prune_keep), self.count(n)
    if merged < n or self.always_sort:
      tokens = take_most_important(tokens, stats, pruned)
    if merged < pruned:
      tokens = _merge_last(tokens, merged, stats.cls_attn.dtype, self.signed_similarity)
    return tokens, Aux(merged)

  def count(self, n: int) -> int:
    return min(n, self.prune_keep, self.merge_keep)


def take_most_important(tokens: Tokens, stats: AttentionStats, count: int) -> Tokens:
  """The `count` tokens that CLS attends to most, the most important first."""
  order = select.importance_order(stats.cls_attn, tokens.num_prefix, count)
  return tokens.replace(
    x=select.take(tokens.x, order),
    size=None if tokens.size is None else select.take(tokens.size, order),
    source=select.follow(tokens.source, order, tokens.x.shape[1]),
  )


def _merge_last(tokens: Tokens, keep: int, dtype: jnp.dtype, signed_similarity: bool) -> Tokens:
  size = jnp.ones(tokens.x.shape[:2], dtype) if tokens.size is None else tokens.size
  receiver, weight = merge.receivers(tokens.x, keep, tokens.num_prefix)
  weight = weight if signed_similarity else jnp.maximum(weight, 0)
  x, size = merge.merge_tail(tokens.x, size, receiver, weight.astype(size.dtype))
  source = merge.follow_merge(tokens.source, receiver, keep)
  return tokens.replace(x=x, size=size, source=source)


keep_all: TokenReducer = KeepAll()
