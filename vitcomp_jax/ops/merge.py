"""Merging the least important tokens into their most similar kept ones, without scatter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def similarity(x: Float[Array, "b s d"], y: Float[Array, "b t d"]) -> Float[Array, "b s t"]:
  """Cosine similarity of every pair; no gradient flows through it."""
  return jnp.einsum("bsd,btd->bst", _unit(x), _unit(y))


def _unit(x: Array) -> Array:
  x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def receivers(
  x: Float[Array, "b n d"], keep: int, num_prefix: int
) -> tuple[Int[Array, "b s"], Float[Array, "b s"]]:
  """The most similar kept token of each token past the first `keep`.

  Args:
    x: Tokens, most important first, the prefix in front.
    keep: Tokens that remain, prefix included.
    num_prefix: Tokens at the front that never receive.

  Returns:
    The receiver's position, in [num_prefix, keep), and the cosine similarity.
  """
  scores = similarity(x[:, keep:], x[:, num_prefix:keep])
  return jnp.argmax(scores, axis=-1) + num_prefix, jnp.max(scores, axis=-1)


def merge_tail(
  x: Float[Array, "b n d"],
  size: Float[Array, "b n"],
  receiver: Int[Array, "b s"],
  weight: Float[Array, "b s"],
) -> tuple[Float[Array, "b t d"], Float[Array, "b t"]]:
  """Merges the last s tokens into their receivers among the first t = n - s.

  A receiver becomes the plain mean of itself and what joins it; its size grows by the joining
  sizes, each times its weight. Gradients flow through the values, not the choice of receiver.

  Args:
    x: Tokens; the last s are merged.
    size: Patches each token stands for.
    receiver: Position each of the last s joins.
    weight: Share of a joining size that is added.

  Returns:
    The t merged tokens and their sizes.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Fig. 3a.
  """
  count = x.shape[1] - receiver.shape[1]
  joins = jax.nn.one_hot(receiver, count, dtype=x.dtype)  # [b s t]
  total = x[:, :count] + jnp.einsum("bst,bsd->btd", joins, x[:, count:])
  joined = jnp.einsum("bst,bs->bt", joins.astype(size.dtype), size[:, count:] * weight)
  return total / (1 + jnp.sum(joins, axis=1))[..., None], size[:, :count] + joined


def follow_merge(
  source: Int[Array, "b p"], receiver: Int[Array, "b s"], keep: int
) -> Int[Array, "b p"]:
  """Where each patch's token is after the merge: tokens past `keep` are their receivers now."""
  moved = jnp.take_along_axis(receiver, jnp.maximum(source - keep, 0), axis=1)
  return jnp.where(source >= keep, moved, source)
