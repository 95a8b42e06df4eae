"""Tokens that flow between layers, and the statistics and interfaces of reducers."""

from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.ops import attention, select

IMPORTANCES = (
  "cls",
  "pool_query",
  "mean_attention",
  "mean_attention_of_all",
  "value_norm",
  "random",
)


class Tokens(flax.struct.PyTreeNode):
  """A batch of token sequences. Shapes: b images, n tokens, d width, p patches."""

  x: Array  # f[b n d]
  size: Array | None  # f[b n] patches a token stands for; None: one each, plain attention
  keep: Array | None  # f[b n] 1 kept, 0 dropped; None: nothing is masked
  source: Array  # i[b p] token that now holds each patch; -1 pruned
  num_prefix: int = flax.struct.field(pytree_node=False)  # never sorted, merged or removed
  num_kept: Array | None = None  # f[] tokens that are not masked, if as many in every image
  pruned: Array | None = None  # f[b p d] the value that a pruned patch had last; None: none was
  place: Array | None = None  # i[b p] token that began as each patch; -1 removed; None: not asked
  probe: Array | None = None  # f[h d] what the pooling head looks for in a normed token

  @property
  def sizes(self) -> Array:
    """Patches that each token stands for, f[b n]: one each where they are not tracked."""
    if self.size is not None:
      return self.size
    return jnp.ones(self.x.shape[:2], jnp.promote_types(self.x.dtype, jnp.float32))


def take_tokens(tokens: Tokens, order: Array) -> Tokens:
  """The tokens at some positions i[b c], in that order; patches of the others are pruned."""
  source = select.follow(tokens.source, order, tokens.x.shape[1])
  return tokens.replace(
    x=select.take(tokens.x, order),
    size=None if tokens.size is None else select.take(tokens.size, order),
    keep=None if tokens.keep is None else select.take(tokens.keep, order),
    source=source,
    place=None if tokens.place is None else select.follow(tokens.place, order, tokens.x.shape[1]),
    pruned=_last_values(tokens, source) if order.shape[1] < tokens.x.shape[1] else tokens.pruned,
  )


def mark_pruned(tokens: Tokens, is_pruned: Array) -> Tokens:
  """The same tokens, of which some, b[b n] or b[1 n], no longer hold their patches."""
  held = jnp.take_along_axis(
    jnp.broadcast_to(is_pruned, tokens.x.shape[:2]), jnp.maximum(tokens.source, 0), axis=1
  )
  source = jnp.where(held, -1, tokens.source)
  return tokens.replace(source=source, pruned=_last_values(tokens, source))


def _last_values(tokens: Tokens, source: Array) -> Array:
  """`Tokens.pruned` after some patches were pruned, which `source` knows already."""
  is_new = (source < 0) & (tokens.source >= 0)
  last = select.take(tokens.x, jnp.maximum(tokens.source, 0))
  before = jnp.zeros_like(last) if tokens.pruned is None else tokens.pruned
  return jnp.where(is_new[..., None], last, before)


def unmerge(tokens: Tokens) -> Float[Array, "b p d"]:
  """Tokens back on the full grid of patches, row by row, for dense tasks.

  A patch shows the token that it became a part of; a pruned one shows the value that it had last,
  normed like the others where they are.

  Args:
    tokens: Of an `Output`: `tokens`, or one of `layers`.
  """
  held = select.take(tokens.x, jnp.maximum(tokens.source, 0))
  if tokens.pruned is None:
    return held
  return jnp.where((tokens.source >= 0)[..., None], held, tokens.pruned)


class AttentionStats(flax.struct.PyTreeNode):
  """Statistics of a layer's attention for reducers; XLA drops those that none uses."""

  q: Array  # f[b h n k] queries
  k: Array  # f[b h n k] keys
  v: Array  # f[b h n k] values
  log_size: Array | None  # f[b n] added to the logits of each key
  keep: Array | None  # as in Tokens
  scale: float = flax.struct.field(pytree_node=False)  # factor of the products

  def importance(self, metric: str, tokens: Tokens) -> Array:
    """Computes the importance of each token, f[b n]; negative where masked.

    Args:
      metric: One of `IMPORTANCES`: the attention that CLS pays a token (mean over heads); that
        which the pooling head would pay it if this layer were the last (its query against the keys
        that it makes of the normed tokens behind this attention, mean over heads); the attention
        that a token receives from all (mean over heads and queries), in a search from all that are
        kept, or, as CAFormer's authors have it, `of_all`, from dropped ones too; the length of its
        values; or random numbers, the same for every image.
      tokens: Behind this attention.
    """
    q, k, rest = self.q, self.k, (self.scale, self.log_size, self.keep)
    if metric == "cls":
      return attention.cls_attention(q[:, :, 0], k, *rest)
    if metric == "pool_query":
      assert tokens.probe is not None, "pool_query needs a pooling head"
      return attention.probe_attention(tokens.x, tokens.probe, tokens.size, tokens.keep)
    if metric.startswith("mean_attention"):
      return attention.mean_attention(q, k, *rest, metric.endswith("of_all"))
    if metric == "value_norm":
      return attention.value_norm(self.v, self.keep)
    # A prefix of the same numbers for any count, so that masking sees what removing does.
    score = jnp.asarray(np.random.default_rng(0).random(k.shape[2], np.float32))
    return attention.last_if_dropped(jnp.tile(score, (k.shape[0], 1)), self.keep)

  @property
  def mean_key(self) -> Array:
    """Each token's key, mean over heads, f[b n k]: what ToMe compares."""
    return self.k.mean(axis=1)


class Aux(flax.struct.PyTreeNode):
  """The token count after one reduction, for losses."""

  count: Array | int  # tokens after it; traced, with straight-through gradients, in a search


class Output(flax.struct.PyTreeNode):
  """Outputs of a forward pass."""

  logits: Array  # f[b classes]; the features where the model has no classifier
  features: Array  # f[b d] pooled, what the classifier sees
  tokens: Tokens  # after the final norm
  layers: tuple[Tokens, ...]  # after each layer
  aux: tuple[tuple[Aux, Aux], ...]  # of each layer's two reductions, before and after attention


@runtime_checkable
class TokenReducer(Protocol):
  """Removes tokens, or masks them, between two parts of a layer."""

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> tuple[Tokens, Aux]: ...

  def count(self, n: int) -> int:
    """Tokens that remain of `n`."""
    ...
