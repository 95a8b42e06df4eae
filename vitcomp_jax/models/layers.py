"""Small modules shared by the models, with timm's parameter names."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.ops.activations import ACTIVATIONS
from vitcomp_jax.ops.norm import layer_norm

Norm = Callable[[Array], Array]

kernel_init = nn.initializers.truncated_normal(0.02)


def identity(x: Array) -> Array:
  """Returns its argument; it takes the place of a part that a model does not have."""
  return x


def dense(features: int, dtype: str | None, use_bias: bool = True) -> nn.Dense:
  """Makes a projection with the initialisation that all models use."""
  return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init)


class LayerNorm(nn.Module):
  """Like Flax's layer norm, in at least float32, with a backward pass twice as fast on a CPU."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
    return layer_norm(self.epsilon, *(a.astype(dtype) for a in (x, scale, bias)))


class RMSNorm(nn.Module):
  """Divides by the root mean square and scales, in at least float32.

  References:
    Zhang and Sennrich, `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`_,
    2019.
  """

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
    x = x.astype(dtype)
    factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return x * factor * scale.astype(dtype).reshape((1,) * (x.ndim - 1) + (-1,))


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}


@dataclasses.dataclass(frozen=True)
class NormSpec:
  """Describes a norm. It is hashable, as it is a field of modules.

  Attributes:
    kind: A key of `NORMS`; None: no norm.
    epsilon: Added to the variance or mean square.
  """

  kind: str | None = None
  epsilon: float = 0.0

  def make(self) -> Norm:
    """Makes the module, or the identity."""
    return identity if self.kind is None else NORMS[self.kind](self.epsilon)


NO_NORM = NormSpec()


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
  use_bias: bool = True
  norm_spec: NormSpec = NO_NORM

  def setup(self) -> None:
    self._make_projections()
    self.norm = self.norm_spec.make()
    self.fc2 = dense(self.width, self.dtype, self.use_bias)

  def _make_projections(self) -> None:
    self.fc1 = dense(self.mlp_dim, self.dtype, self.use_bias)

  def __call__(self, x: Float[Array, "b n d"], gate: Gate = open_gate) -> Float[Array, "b n d"]:
    return self.fc2(self.norm(gate(self.hidden(x))))

  def hidden(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
    """Returns the hidden units."""
    return ACTIVATIONS[self.activation](self.fc1(x))


class GluMlp(Mlp):
  """An MLP whose hidden units are values times activated gates, both from one projection.

  References:
    Shazeer, `GLU Variants Improve Transformer <https://arxiv.org/abs/2002.05202>`_, 2020, Eq. 6.
  """

  def _make_projections(self) -> None:
    self.fc1 = dense(2 * self.mlp_dim, self.dtype, self.use_bias)

  def hidden(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
    gates, values = jnp.split(self.fc1(x), 2, axis=-1)
    return ACTIVATIONS[self.activation](gates) * values


class SwigluMlp(Mlp):
  """A `GluMlp` with one projection for gates and another for values."""

  def _make_projections(self) -> None:
    self.fc1_g = dense(self.mlp_dim, self.dtype, self.use_bias)
    self.fc1_x = dense(self.mlp_dim, self.dtype, self.use_bias)

  def hidden(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
    return ACTIVATIONS[self.activation](self.fc1_g(x)) * self.fc1_x(x)


MLPS: dict[str, type[Mlp]] = {"mlp": Mlp, "glu": GluMlp, "swiglu": SwigluMlp}


class PatchEmbed(nn.Module):
  """Maps each patch of an image to a token by a convolution whose stride is its kernel size.

  Pixels to the right of and below the last whole patch are cropped.
  """

  patch_size: int
  width: int
  dtype: str | None = None
  use_bias: bool = True
  norm_spec: NormSpec = NO_NORM

  def setup(self) -> None:
    self.proj = _PatchProjection(self.patch_size, self.width, self.dtype, self.use_bias)
    self.norm = self.norm_spec.make()

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b p d"]:
    rows, columns = (side // self.patch_size * self.patch_size for side in images.shape[1:3])
    return self.norm(self.proj(images[:, :rows, :columns]))


class _PatchProjection(nn.Module):
  """Computes the convolution as one matrix product over flattened patches, row by row."""

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
