"""Merging tokens into their most similar ones, without scatter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vitcomp_jax.ops import select


def similarity(x: Float[Array, "b s d"], y: Float[Array, "b t d"]) -> Float[Array, "b s t"]:
  """Cosine similarity of every pair; no gradient flows through it."""
  return jnp.einsum("bsd,btd->bst", _unit(x), _unit(y))


def _unit(x: Array) -> Array:
  x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def receivers(
  x: Float[Array, "b n d"], keep: int, first: int
) -> tuple[Int[Array, "b s"], Float[Array, "b s"]]:
  """The most similar kept token of each token past the first `keep`.

  Args:
    x: Tokens, most important first, the prefix in front.
    keep: Tokens that remain, prefix included.
    first: The first token that may receive; the prefix never does.

  Returns:
    The receiver's position, in [first, keep), and the cosine similarity.
  """
  receiver, score = best(similarity(x[:, keep:], x[:, first:keep]))
  return receiver + first, score


def best(scores: Float[Array, "b s t"]) -> tuple[Int[Array, "b s"], Float[Array, "b s"]]:
  """The place and the value of each row's largest score; of equals, the first."""
  largest = jnp.max(scores, axis=-1)
  # XLA's argmax runs number by number on a CPU; this takes a third of its time there.
  place = jnp.arange(scores.shape[-1], dtype=scores.dtype)[None, None]
  first = jnp.min(jnp.where(scores == largest[..., None], place, jnp.inf), axis=-1)
  return first.astype(jnp.int32), largest


def joins(receiver: Int[Array, "b s"], count: int, dtype: jnp.dtype) -> Float[Array, "b t s"]:
  """1 where a token joins a receiver, of `count` receivers; that layout suits a matrix product."""
  return (receiver[:, None] == jnp.arange(count)[None, :, None]).astype(dtype)


@jax.custom_vjp
def join(
  x: Float[Array, "b n d"], receiver: Int[Array, "b n"], is_joining: Bool[Array, "#b n"]
) -> Float[Array, "b n d"]:
  """The sum of what joins each token; the gradient of a joining token is that of its receiver."""
  joined = joins(receiver, x.shape[1], x.dtype) * is_joining[:, None].astype(x.dtype)
  return jnp.einsum("bts,bsd->btd", joined, x)


def _join_forward(x: Array, receiver: Array, is_joining: Array) -> tuple[Array, tuple[Array, ...]]:
  return join(x, receiver, is_joining), (receiver, is_joining)


def _join_backward(kept: tuple[Array, ...], grad: Array) -> tuple[Array, None, None]:
  receiver, is_joining = kept
  return jnp.where(is_joining[..., None], select.take(grad, receiver), 0), None, None


join.defvjp(_join_forward, _join_backward)


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
  joined = joins(receiver, count, x.dtype)
  total = x[:, :count] + jnp.einsum("bts,bsd->btd", joined, x[:, count:])
  share = jnp.einsum("bts,bs->bt", joined.astype(size.dtype), size[:, count:] * weight)
  return total / (1 + jnp.sum(joined, axis=2))[..., None], size[:, :count] + share


def follow_merge(
  source: Int[Array, "b p"], receiver: Int[Array, "b s"], keep: int
) -> Int[Array, "b p"]:
  """Updates the token that holds each patch: tokens past `keep` become their receivers."""
  moved = jnp.take_along_axis(receiver, jnp.maximum(source - keep, 0), axis=1)
  return jnp.where(source >= keep, moved, source)


def bipartite_match(
  metric: Float[Array, "b n k"], remove: int, num_prefix: int
) -> tuple[Int[Array, "b t"], Int[Array, "b {remove}"], Int[Array, "b {remove}"]]:
  """ToMe's matching: of the tokens at even positions, those most similar to one at an odd position.

  Args:
    metric: What is compared, by cosine.
    remove: Tokens that are merged away, at most (n - num_prefix) // 2.
    num_prefix: Tokens at the front that neither merge nor receive.

  Returns:
    The positions of the t = n - remove tokens that remain, in their new order: the prefix, the
    unmerged ones of the even positions, those of the odd ones; the positions of the merged ones,
    most similar first; and the place of each one's receiver in the new order.

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
  order = jnp.concatenate(
    [
      jnp.broadcast_to(jnp.arange(num_prefix), (b, num_prefix)),
      2 * unmerged,
      jnp.broadcast_to(odd[prefix_odd:], (b, odd.size - prefix_odd)),
    ],
    axis=1,
  )
  first_odd = num_prefix + unmerged.shape[1]
  chosen = jnp.take_along_axis(receiver, merged, axis=1)
  return order, 2 * merged, first_odd + chosen - prefix_odd


def merge_weighted(
  x: Float[Array, "b t d"],
  size: Float[Array, "b t"],
  joining: Float[Array, "b s d"],
  joining_size: Float[Array, "b s"],
  receiver: Int[Array, "b s"],
) -> tuple[Float[Array, "b t d"], Float[Array, "b t"]]:
  """Merges tokens into their receivers: means weighted by size, and sums of sizes.

  Args:
    x: Tokens that remain.
    size: Patches each of them stands for.
    joining: Tokens that are merged away.
    joining_size: Patches each of those stands for.
    receiver: Place in `x` that each of those joins.
  """
  share = joins(receiver, x.shape[1], size.dtype) * joining_size[:, None]
  total_size = size + jnp.sum(share, axis=2)
  joined = jnp.einsum("bts,bsd->btd", share.astype(x.dtype), joining)
  total = x * size[..., None].astype(x.dtype) + joined
  return total / total_size[..., None].astype(x.dtype), total_size


def follow_join(
  source: Int[Array, "b p"],
  order: Int[Array, "b t"],
  merged: Int[Array, "b s"],
  receiver: Int[Array, "b s"],
  num_tokens: int,
) -> Int[Array, "b p"]:
  """Updates the token that holds each patch after some tokens were merged away.

  Args:
    source: Token that holds each patch before; -1: pruned.
    order: Positions of the tokens that remain.
    merged: Positions of those that were merged away.
    receiver: Their receivers' places in `order`.
    num_tokens: Tokens there were before.
  """
  found = merged[:, None, :] == source[:, :, None]  # [b p s]
  joined = jnp.sum(jnp.where(found, receiver[:, None, :], 0), axis=2)
  return jnp.where(jnp.any(found, axis=2), joined, select.follow(source, order, num_tokens))
