"""Small modules shared by the models, with timm's parameter names."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.ops.activations import ACTIVATIONS
from vitcomp_jax.ops.norm import layer_norm

kernel_init = nn.initializers.truncated_normal(0.02)


def identity(x: Array) -> Array:
  """Returns its argument: replaces a part that a model does not have."""
  return x


def dense(features: int, dtype: str | None, use_bias: bool = True) -> nn.Dense:
  """Makes a projection with the models' initialisation."""
  return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init)


class LayerNorm(nn.Module):
  """Flax's layer norm, in at least float32, with a backward pass twice as fast on a CPU."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
    return layer_norm(self.epsilon, *(a.astype(dtype) for a in (x, scale, bias)))


class LayerScale(nn.Module):
  """A learnt factor per channel."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    gamma = self.param("gamma", nn.initializers.constant(1e-5), (self.width,))
    return x * gamma.astype(x.dtype)[None, None]


class Mlp(nn.Module):
  """Two projections with an activation between them."""

  mlp_dim: int
  width: int
  dtype: str | None = None
  activation: str = "gelu"

  def setup(self) -> None:
    self.fc1 = dense(self.mlp_dim, self.dtype)
    self.fc2 = dense(self.width, self.dtype)

  def __call__(self, x: Float[Array, "b n d"], gate: Gate = open_gate) -> Float[Array, "b n d"]:
    return self.fc2(gate(ACTIVATIONS[self.activation](self.fc1(x))))


class PatchEmbed(nn.Module):
  """Cuts an image into patches and maps each to a token: a convolution whose stride is its size."""

  patch_size: int
  width: int
  dtype: str | None = None
  use_bias: bool = True

  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p d"]:
    p = self.patch_size
    return _PatchProjection(p, self.width, self.dtype, self.use_bias, name="proj")(images)


class _PatchProjection(nn.Module):
  """The convolution as one matrix product over flattened patches, row by row."""

  patch_size: int
  width: int
  dtype: str | None
  use_bias: bool

  @nn.compact
  def __call__(self, images: Array) -> Array:
    p = self.patch_size
    b, h, w, c = images.shape
    kernel = self.param("kernel", kernel_init, (p, p, c, self.width))
    zeros = nn.initializers.zeros
    bias = self.param("bias", zeros, (self.width,)) if self.use_bias else None
    patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
    patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
    y = patches @ kernel.reshape(p * p * c, self.width)
    return y if bias is None else y + bias[None, None]
