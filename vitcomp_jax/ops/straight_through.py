"""Functions with straight-through gradients, for learning integers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def ste_ceil(x: Float[Array, ""], tolerance: float = 0.0) -> Float[Array, ""]:
  """Computes ceil(x - tolerance) with the gradient of x.

  Args:
    x: Any scalar.
    tolerance: Excess over an integer that is still rounded down to it, so that rounding errors are
      not rounded up.
  """
  return x + jax.lax.stop_gradient(jnp.ceil(x - tolerance) - x)


def ste_mask(probability: Float[Array, " n"], dropped: Bool[Array, " n"]) -> Float[Array, " n"]:
  """Computes a hard 0/1 mask, 0 where `dropped`, with the gradient of `probability`.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Eq. 6.
  """
  # hard - p + p is exact in float32 for hard in {0, 1} and p in [0, 1].
  hard = 1 - dropped.astype(probability.dtype)
  return hard - jax.lax.stop_gradient(probability) + probability


@jax.custom_jvp
def ste_min(before: Array, prune_count: Array, merge_count: Array) -> Array:
  """Computes the minimum of the three, with a full gradient to both counts and none to `before`.

  The gradient of the budget thus reaches both counts of a layer, whichever is smaller, but not
  through the counts of later layers.
  """
  return jnp.minimum(before, jnp.minimum(prune_count, merge_count))


@ste_min.defjvp
def _ste_min_jvp(primals, tangents):
  _, prune_tangent, merge_tangent = tangents
  return ste_min(*primals), prune_tangent + merge_tangent


@jax.custom_vjp
def ste_clip(x: Float[Array, ""], low: Array, high: Array) -> Float[Array, ""]:
  """Clips x, passing on any gradient except one that would push x further out of the range.

  Under gradient descent, x thus neither gets stuck outside the range nor drifts away from it.
  """
  return jnp.clip(x, low, high)


def _ste_clip_forward(x: Array, low: Array, high: Array) -> tuple[Array, tuple[Array, Array]]:
  return jnp.clip(x, low, high), (x < low, x > high)


def _ste_clip_backward(is_out: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
  is_below, is_above = is_out
  grad = jnp.where(is_below, jnp.minimum(grad, 0), grad)
  return jnp.where(is_above, jnp.maximum(grad, 0), grad), None, None


ste_clip.defvjp(_ste_clip_forward, _ste_clip_backward)
