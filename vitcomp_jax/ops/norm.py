"""Layer norm, with a backward pass of its own."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(
  epsilon: float, x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "*b d"]:
  """Standardises the last axis, then scales and shifts it.

  Its backward pass, which keeps the input alone, takes a CPU half the time of autodiff's.

  Args:
    epsilon: Added to the variance.
    x: Of the dtype in which it is computed, as are the others.
    scale: Factor of each channel.
    bias: Summand of each channel.
  """
  normed, _ = _normed(epsilon, x)
  return normed * _as_row(scale, x) + _as_row(bias, x)


def _normed(epsilon: float, x: Array) -> tuple[Array, Array]:
  """Returns x with mean 0 and variance 1 in the last axis, and the factor that made it so."""
  # E[x²] - E[x]², which is faster, costs digits that the golden tests see.
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
  return centred * factor, factor


def _forward(
  epsilon: float, x: Array, scale: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
  return layer_norm(epsilon, x, scale, bias), (x, scale)


def _backward(epsilon: float, kept: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
  x, scale = kept
  normed, factor = _normed(epsilon, x)
  # Behind the barrier it is an array; each mean would have XLA write down the scale for all tokens.
  slope = jax.lax.optimization_barrier(grad * _as_row(scale, x))
  along = jnp.mean(slope * normed, axis=-1, keepdims=True)
  dx = factor * (slope - jnp.mean(slope, axis=-1, keepdims=True) - normed * along)
  tokens = tuple(range(x.ndim - 1))
  return dx, jnp.sum(grad * normed, axis=tokens), jnp.sum(grad, axis=tokens)


layer_norm.defvjp(_forward, _backward)


def _as_row(values: Array, x: Array) -> Array:
  return values.reshape((1,) * (x.ndim - 1) + (-1,))
