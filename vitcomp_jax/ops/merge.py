"""Merges tokens into the most similar ones, without scatter operations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vitcomp_jax.ops import select


def similarity(x: Float[Array, "b s d"], y: Float[Array, "b t d"]) -> Float[Array, "b s t"]:
  """Computes the cosine similarity of every pair, without a gradient."""
  return jnp.einsum("bsd,btd->bst", _unit(x), _unit(y))


def _unit(x: Array) -> Array:
  x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def receivers(
  x: Float[Array, "b n d"], keep: int, first: int
) -> tuple[Int[Array, "b s"], Float[Array, "b s"]]:
  """Finds, for each token after the first `keep`, the most similar of the kept tokens.

  Args:
    x: The prefix, then the other tokens by decreasing importance.
    keep: Number of tokens that remain, prefix included.
    first: Position of the first token that may be a receiver, after the prefix.

  Returns:
    The receiver's position, in [first, keep), and the cosine similarity.
  """
  receiver, score = best(similarity(x[:, keep:], x[:, first:keep]))
  return receiver + first, score


def best(scores: Float[Array, "b s t"]) -> tuple[Int[Array, "b s"], Float[Array, "b s"]]:
  """Returns the index and the value of each row's largest score; ties go to the first."""
  largest = jnp.max(scores, axis=-1)
  # XLA's argmax is not vectorised on a CPU; this takes a third of its time.
  place = jnp.arange(scores.shape[-1], dtype=scores.dtype)[None, None]
  first = jnp.min(jnp.where(scores == largest[..., None], place, jnp.inf), axis=-1)
  return first.astype(jnp.int32), largest


def joins(receiver: Int[Array, "b s"], count: int, dtype: jnp.dtype) -> Float[Array, "b t s"]:
  """Returns a matrix that is 1 where a token joins one of `count` receivers, and 0 elsewhere."""
  return (receiver[:, None] == jnp.arange(count)[None, :, None]).astype(dtype)


@jax.custom_vjp
def join(
  x: Float[Array, "b n d"], receiver: Int[Array, "b n"], share: Float[Array, "b n"]
) -> Float[Array, "b n d"]:
  """Sums, for each token, the shares of the tokens that join it; the gradient is a gather."""
  joined = joins(receiver, x.shape[1], x.dtype) * share[:, None].astype(x.dtype)
  return jnp.einsum("bts,bsd->btd", joined, x)


def _join_forward(x: Array, receiver: Array, share: Array) -> tuple[Array, tuple[Array, ...]]:
  return join(x, receiver, share), (x, receiver, share)


def _join_backward(kept: tuple[Array, ...], grad: Array) -> tuple[Array, None, Array]:
  x, receiver, share = kept
  grad = select.take(grad, receiver)
  by_share = jnp.sum((grad * x).astype(share.dtype), axis=-1)
  return grad * share[..., None].astype(grad.dtype), None, by_share


join.defvjp(_join_forward, _join_backward)


def merge_tail(
  x: Float[Array, "b n d"],
  size: Float[Array, "b n"],
  receiver: Int[Array, "b s"],
  weight: Float[Array, "b s"],
) -> tuple[Float[Array, "b t d"], Float[Array, "b t"]]:
  """Merges the last s tokens into their receivers among the first t = n - s.

  A receiver becomes the unweighted mean of itself and the tokens that join it; its size grows by
  their weighted sizes. Gradients flow through the values, but not through the choice of receivers.

  Args:
    x: Tokens; the last s are merged.
    size: Number of patches that each token represents.
    receiver: Position of the receiver of each of the last s tokens.
    weight: Share of each merged token's size that is added to its receiver's.

  Returns:
    The t merged tokens and their sizes.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Fig. 3a.
  """
  count = x.shape[1] - receiver.shape[1]
  joined = joins(receiver, count, x.dtype)
  total = x[:, :count] + jnp.einsum("bts,bsd->btd", joined, x[:, count:])
  share = jnp.einsum("bts,bs->bt", joined.astype(size.dtype), size[:, count:] * weight)
  return total / (1 + jnp.sum(joined, axis=2))[..., None], size[:, :count] + share


def bipartite_match(
  metric: Float[Array, "b n k"], remove: int, num_prefix: int
) -> tuple[Int[Array, "b n"], Int[Array, "b {remove}"]]:
  """Matches tokens at even positions with the most similar ones at odd positions, as ToMe does.

  Args:
    metric: Vectors to compare by cosine similarity.
    remove: Number of tokens to merge away, at most (n - num_prefix) // 2.
    num_prefix: Tokens at the front that neither merge nor receive.

  Returns:
    An order of all tokens, and the receivers of its last `remove` ones as positions in that order.
    The order consists of the prefix, the remaining even positions, the odd positions, and finally
    the tokens to merge away, most similar first.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Sec. 3 and appendix D.
  """
  b, n, _ = metric.shape
  even, odd = jnp.arange(0, n, 2), jnp.arange(1, n, 2)
  prefix_even, prefix_odd = (num_prefix + 1) // 2, num_prefix // 2
  scores = similarity(metric[:, 0::2], metric[:, 1::2])
  may = (even >= num_prefix)[:, None] & (odd >= num_prefix)[None, :]
  scores = jnp.where(may[None], scores, -jnp.inf)
  receiver, score = best(scores)
  _, merged = jax.lax.top_k(score, remove)  # [b r] among the even ones
  is_merged = jnp.any(merged[:, :, None] == jnp.arange(even.size)[None, None], axis=1)
  unmerged = jnp.argsort(is_merged, axis=1, stable=True)[:, prefix_even : even.size - remove]
  prefix = jnp.broadcast_to(jnp.arange(num_prefix), (b, num_prefix))
  others = jnp.broadcast_to(odd[prefix_odd:], (b, odd.size - prefix_odd))
  order = jnp.concatenate([prefix, 2 * unmerged, others, 2 * merged], axis=1)
  first_odd = num_prefix + unmerged.shape[1]
  return order, first_odd + jnp.take_along_axis(receiver, merged, axis=1) - prefix_odd


def merge_weighted(
  x: Float[Array, "b n d"], size: Float[Array, "b n"], receiver: Int[Array, "b s"]
) -> tuple[Float[Array, "b t d"], Float[Array, "b t"]]:
  """Merges the last s tokens into their receivers among the first t = n - s, weighted by size.

  Args:
    x: Tokens; the last s are merged.
    size: Number of patches that each token represents.
    receiver: Position of the receiver of each of the last s tokens.

  Returns:
    The t merged tokens, each the mean of the patches that it represents, and their sizes.

  References:
    Bolya et al., `ToMe <https://arxiv.org/abs/2210.09461>`_, 2022, Sec. 3.
  """
  count = x.shape[1] - receiver.shape[1]
  share = joins(receiver, count, size.dtype) * size[:, None, count:]
  total_size = size[:, :count] + jnp.sum(share, axis=2)
  joined = jnp.einsum("bts,bsd->btd", share.astype(x.dtype), x[:, count:])
  total = x[:, :count] * size[:, :count, None].astype(x.dtype) + joined
  return total / total_size[..., None].astype(x.dtype), total_size
