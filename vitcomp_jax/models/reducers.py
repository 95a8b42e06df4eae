"""Static reducers: frozen dataclasses of plain values, at once jit key and JSON."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.models.tokens import AttentionStats, Aux, TokenReducer, Tokens, take_tokens
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
    prefix = tokens.num_prefix
    patches = jnp.array(self.positions[prefix:], jnp.int32) - prefix
    # Where those patches are by now: earlier layers may have dropped others.
    order = jnp.concatenate(
      [
        jnp.broadcast_to(jnp.arange(prefix), (tokens.x.shape[0], prefix)),
        tokens.source[:, patches],
      ],
      axis=1,
    )
    return take_tokens(tokens, order), Aux(len(self.positions))

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
    importance: What tells the important tokens, see `AttentionStats.importance`.
    whole_sizes: Add joining sizes whole, whatever the similarity, as CAFormer's authors do.
    first_receives: May the most important token receive; in CAFormer's authors' code it cannot.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.2 and Fig. 3a.
  """

  prune_keep: int
  merge_keep: int
  signed_similarity: bool = False
  always_sort: bool = False
  importance: str = "cls"
  whole_sizes: bool = False
  first_receives: bool = True

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None, "PruneMerge needs the attention's statistics"
    n = tokens.x.shape[1]
    pruned, merged = min(n, self.prune_keep), self.count(n)
    if merged < n or self.always_sort:
      importance = stats.importance(self.importance, tokens)
      tokens = take_tokens(tokens, select.importance_order(importance, tokens.num_prefix, pruned))
    if merged < pruned:
      tokens = self._merge_last(tokens, merged)
    return tokens, Aux(merged)

  def count(self, n: int) -> int:
    return min(n, self.prune_keep, self.merge_keep)

  def _merge_last(self, tokens: Tokens, keep: int) -> Tokens:
    size = _one_each(tokens) if tokens.size is None else tokens.size
    first = min(tokens.num_prefix + (not self.first_receives), keep - 1)
    receiver, weight = merge.receivers(tokens.x, keep, first)
    weight = weight if self.signed_similarity else jnp.maximum(weight, 0)
    weight = jnp.ones_like(weight) if self.whole_sizes else weight
    x, size = merge.merge_tail(tokens.x, size, receiver, weight.astype(size.dtype))
    source = merge.follow_merge(tokens.source, receiver, keep)
    return tokens.replace(x=x, size=size, source=source)


@dataclasses.dataclass(frozen=True)
class BipartiteMerge:
  """ToMe's reduction: merges tokens at even positions into similar ones at odd positions.

  Attributes:
    remove: Tokens that are merged away, 1 to half of those behind the prefix.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Sec. 3.
  """

  remove: int

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None, "BipartiteMerge needs the attention's keys"
    n = tokens.x.shape[1]
    match = merge.bipartite_match(stats.mean_key, self.remove, tokens.num_prefix)
    order, merged, receiver = match
    size = _one_each(tokens) if tokens.size is None else tokens.size
    x, size = merge.merge_weighted(
      select.take(tokens.x, order),
      select.take(size, order),
      select.take(tokens.x, merged),
      select.take(size, merged),
      receiver,
    )
    source = merge.follow_join(tokens.source, order, merged, receiver, n)
    return tokens.replace(x=x, size=size, source=source), Aux(n - self.remove)

  def count(self, n: int) -> int:
    return n - self.remove


@dataclasses.dataclass(frozen=True)
class AttentiveSelect:
  """EViT's reduction: keeps the tokens that CLS attends to most, and fuses the others into one.

  The fused token is the sum of the others, each times its importance, the attention that CLS pays
  it; it stands last and is a token like any other from then on.

  Attributes:
    keep: Tokens that are kept, prefix included, the fused token not.
    fuse: Whether the others are fused; otherwise they are gone.
    importance: What stands in for the attention of CLS where there is none, see `PruneMerge`.

  References:
    Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, 2022, Sec. 3.2 and Eq. 4.
  """

  keep: int
  fuse: bool = True
  importance: str = "cls"

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]:
    assert stats is not None, "AttentiveSelect needs the attention's statistics"
    n = tokens.x.shape[1]
    if self.keep >= n:
      return tokens, Aux(n)
    importance = stats.importance(self.importance, tokens)
    order = select.importance_order(importance, tokens.num_prefix, self.keep)
    kept = take_tokens(tokens, order)
    if self.fuse:
      x, size = kept.x, kept.size
      dropped = jnp.all(order[:, :, None] != jnp.arange(n)[None, None], axis=1)
      weight = jnp.where(dropped, importance, 0)
      fused = jnp.einsum("bn,bnd->bd", weight.astype(tokens.x.dtype), tokens.x)
      x = jnp.concatenate([x, fused[:, None]], axis=1)
      if tokens.size is not None and size is not None:
        gone = jnp.sum(jnp.where(dropped, tokens.size, 0), axis=1, keepdims=True)
        size = jnp.concatenate([size, gone], axis=1)
      source = jnp.where((kept.source < 0) & (tokens.source >= 0), self.keep, kept.source)
      kept = tokens.replace(x=x, size=size, source=source)
    return kept, Aux(self.count(n))

  def count(self, n: int) -> int:
    return n if self.keep >= n else self.keep + self.fuse


def _one_each(tokens: Tokens) -> Array:
  """The sizes of tokens that stand for one patch each."""
  return jnp.ones(tokens.x.shape[:2], jnp.promote_types(tokens.x.dtype, jnp.float32))


keep_all: TokenReducer = KeepAll()
