"""Sorts tokens by importance, takes the first ones, and tracks which token holds each patch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def importance_order(
  importance: Float[Array, "b n"], num_prefix: int, count: int
) -> Int[Array, "b {count}"]:
  """Returns the positions of the prefix and of the most important tokens, `count` in total.

  Args:
    importance: Score of each token; the prefix's scores are ignored.
    num_prefix: Tokens at the front that always stay.
    count: Number of positions to return, prefix included.

  Returns:
    Positions of the prefix, then of the others by decreasing importance; ties keep their order.
  """
  scores = importance[:, num_prefix:]
  if count == importance.shape[1]:
    # A full sort is as fast here and, unlike `top_k`, XLA can partition it over devices.
    order = jnp.argsort(-scores, axis=1, stable=True).astype(jnp.int32)
  else:
    _, order = jax.lax.top_k(scores, count - num_prefix)
  if not num_prefix:  # ONNX has no empty arrays to reshape
    return order
  prefix = jnp.tile(jnp.arange(num_prefix, dtype=jnp.int32), (importance.shape[0], 1))
  return jnp.concatenate([prefix, order + num_prefix], axis=1)


def take(x: Array, order: Int[Array, "b c"]) -> Array:
  """Gathers along the token axis: x [b n] or [b n d] -> [b c] or [b c d]."""
  index = order if x.ndim == 2 else order[:, :, None]
  return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def permute(x: Float[Array, "b n d"], order: Int[Array, "b n"]) -> Float[Array, "b n d"]:
  """Reorders all tokens; the gradient is a gather, whereas that of `take` is a scatter."""
  return take(x, order)


def _permute_forward(x: Array, order: Array) -> tuple[Array, Array]:
  return take(x, order), order


def _permute_backward(order: Array, grad: Array) -> tuple[Array, None]:
  return take(grad, jnp.argsort(order, axis=1)), None


permute.defvjp(_permute_forward, _permute_backward)


def follow(
  source: Int[Array, "b p"], order: Int[Array, "b c"], num_tokens: int
) -> Int[Array, "b p"]:
  """Updates which token holds each patch after `take(_, order)`; -1 if that token was dropped.

  Args:
    source: Token that held each patch before; -1: pruned earlier.
    order: Positions that were taken.
    num_tokens: Number of tokens before.
  """
  found = order[:, :, None] == jnp.arange(num_tokens)[None, None]  # [b c n]
  rank = jnp.where(jnp.any(found, axis=1), jnp.argmax(found, axis=1), -1)  # [b n]
  return jnp.where(source >= 0, take(rank, jnp.maximum(source, 0)), -1)
