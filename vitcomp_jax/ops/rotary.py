"""Rotation of pairs of channels."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
  x: Float[Array, "b h n k"], angles: Float[Array, "#b #h n k//2"], halves: bool
) -> Float[Array, "b h n k"]:
  """Rotates pairs of channels of each token.

  Args:
    x: Queries or keys.
    angles: Angle of each token and pair, in at least float32.
    halves: If true, channel i is paired with i + k/2; otherwise 2i with 2i + 1.

  References:
    Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021, Eq. 34.
  """
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  if halves:
    first, second = jnp.split(x, 2, axis=-1)
    turned = _turned(first, second, sin, cos)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
  turned = _turned(x[..., 0::2], x[..., 1::2], sin, cos)
  return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


def _turned(first: Array, second: Array, sin: Array, cos: Array) -> tuple[Array, Array]:
  return first * cos - second * sin, second * cos + first * sin
