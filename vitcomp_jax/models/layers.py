"""The parts of an encoder layer, under timm's names."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.models.tokens import AttentionStats, Aux, TokenReducer, Tokens, first_tokens
from vitcomp_jax.ops.attention import attend

_kernel_init = nn.initializers.truncated_normal(0.02)


def dense(features: int, dtype: str | None) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=_kernel_init)


class LayerNorm(nn.Module):
  """Flax's layer norm, in at least float32, whose backward pass a CPU does in half the time."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
    return _scaled_norm(self.epsilon, *(a.astype(dtype) for a in (x, scale, bias)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_norm(epsilon: float, x: Array, scale: Array, bias: Array) -> Array:
  normed, _ = _normed(epsilon, x)
  return normed * _as_row(scale, x) + _as_row(bias, x)


def _normed(epsilon: float, x: Array) -> tuple[Array, Array]:
  """x with mean 0 and variance 1 in the last axis, and what it was multiplied with."""
  # E[x²] - E[x]², which is faster, costs digits that the golden tests see.
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
  return centred * factor, factor


def _norm_forward(
  epsilon: float, x: Array, scale: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
  return _scaled_norm(epsilon, x, scale, bias), (x, scale)


def _norm_backward(epsilon: float, kept: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
  x, scale = kept
  normed, factor = _normed(epsilon, x)
  # Behind the barrier it is an array; each mean would have XLA write down the scale for all tokens.
  slope = jax.lax.optimization_barrier(grad * _as_row(scale, x))
  along = jnp.mean(slope * normed, axis=-1, keepdims=True)
  dx = factor * (slope - jnp.mean(slope, axis=-1, keepdims=True) - normed * along)
  tokens = tuple(range(x.ndim - 1))
  return dx, jnp.sum(grad * normed, axis=tokens), jnp.sum(grad, axis=tokens)


_scaled_norm.defvjp(_norm_forward, _norm_backward)


def _as_row(values: Array, x: Array) -> Array:
  return values.reshape((1,) * (x.ndim - 1) + (-1,))


class PatchEmbed(nn.Module):
  """Cuts an image into patches and maps each to a token: a convolution whose stride is its size."""

  patch_size: int
  width: int
  dtype: str | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p d"]:
    p = self.patch_size
    return _PatchProjection(p, self.width, self.dtype, name="proj")(images)


class _PatchProjection(nn.Module):
  """The convolution as one matrix product over flattened patches, row by row."""

  patch_size: int
  width: int
  dtype: str | None

  @nn.compact
  def __call__(self, images: Array) -> Array:
    p = self.patch_size
    b, h, w, c = images.shape
    kernel = self.param("kernel", _kernel_init, (p, p, c, self.width))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
    patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
    return patches @ kernel.reshape(p * p * c, self.width) + bias[None, None]


@jax.custom_vjp
def gelu(x: Array) -> Array:
  """The exact GELU, x times the normal distribution's cumulative probability.

  By erf, as PyTorch has it: `nn.gelu` asks for erfc, which takes three times as long on a CPU.
  """
  return x * _normal_cdf(x)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
  return gelu(x), x


def _gelu_backward(x: Array, grad: Array) -> tuple[Array]:
  """The slope anew from the argument, which is kept anyway: less memory, and on a CPU less time.

  The barrier keeps XLA from finding the probability in the forward pass, and storing it there.
  """
  x = jax.lax.optimization_barrier(x)
  density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
  return (((_normal_cdf(x) + x * density) * grad).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: Array) -> Array:
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection to queries, keys and values."""

  spec: LayerSpec
  width: int
  dtype: str | None = None
  form: str = "auto"

  def setup(self) -> None:
    self.qkv = dense(3 * self.spec.num_heads * self.spec.head_dim, self.dtype)
    self.proj = dense(self.width, self.dtype)

  def __call__(
    self, x: Float[Array, "b n d"], size: Array | None, keep: Array | None, gate: Gate = open_gate
  ) -> tuple[Float[Array, "b q d"], AttentionStats]:
    b, n, _ = x.shape
    s = self.spec
    # Divided before anything else, so that in a backward pass the three are put side by side again
    # as they are. Heads stand next to the batch: each product is one batched matrix product.
    q, k, v = (
      gate(part.reshape(1, b, n, s.num_heads, s.head_dim).swapaxes(2, 3))[0]
      for part in jnp.split(self.qkv(x), 3, axis=-1)
    )
    log_size = jnp.log(size) if s.size_bias and size is not None else None
    q = q[:, :, : s.queries]
    y = attend(q, k, v, s.qk_scale, log_size, keep, s.mask_eps, self.form)
    y = y.transpose(0, 2, 1, 3).reshape(b, q.shape[2], s.num_heads * s.head_dim)
    return self.proj(y), AttentionStats(q, k, v, log_size, keep, s.qk_scale)


class Mlp(nn.Module):
  """Two projections with an exact GELU between them."""

  mlp_dim: int
  width: int
  dtype: str | None = None

  def setup(self) -> None:
    self.fc1 = dense(self.mlp_dim, self.dtype)
    self.fc2 = dense(self.width, self.dtype)

  def __call__(self, x: Float[Array, "b n d"], gate: Gate = open_gate) -> Float[Array, "b n d"]:
    return self.fc2(gate(gelu(self.fc1(x))))


class LayerScale(nn.Module):
  """A learnt factor per channel."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    gamma = self.param("gamma", nn.initializers.constant(1e-5), (self.width,))
    return x * gamma.astype(x.dtype)[None, None]


class EncoderBlock(nn.Module):
  """A pre-norm encoder layer whose tokens may be reduced before and after attention."""

  spec: LayerSpec
  width: int
  norm_eps: float
  # Held as fields of their own so that Flax adopts the ones that are modules.
  select: TokenReducer
  reduce: TokenReducer
  token_gate: Gate
  head_gate: Gate
  hidden_gate: Gate
  dtype: str | None = None
  attention: str = "auto"

  def setup(self) -> None:
    self.norm1 = LayerNorm(self.norm_eps)
    self.attn = Attention(self.spec, self.width, self.dtype, self.attention)
    self.norm2 = LayerNorm(self.norm_eps)
    self.mlp = Mlp(self.spec.mlp_dim, self.width, self.dtype)
    if self.spec.layer_scale:
      self.ls1, self.ls2 = LayerScale(self.width), LayerScale(self.width)

  def __call__(self, tokens: Tokens) -> tuple[Tokens, tuple[Aux, Aux]]:
    tokens, selected = self.select(tokens, None)
    x = self.token_gate(self.norm1(tokens.x))
    y, stats = self.attn(x, tokens.size, tokens.keep, self.head_gate)
    y = self.ls1(y) if self.spec.layer_scale else y
    tokens = tokens if self.spec.queries is None else first_tokens(tokens, self.spec.queries)
    tokens = tokens.replace(x=tokens.x + self._drop_path(y))
    tokens, reduced = self.reduce(tokens, stats)
    y = self.mlp(self.token_gate(self.norm2(tokens.x)), self.hidden_gate)
    y = self.ls2(y) if self.spec.layer_scale else y
    return tokens.replace(x=tokens.x + self._drop_path(y)), (selected, reduced)

  def _drop_path(self, y: Array) -> Array:
    """Stochastic depth: drops the branch for some images and scales it up for the others."""
    rate = self.spec.drop_path
    if not rate:
      return y
    kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - rate, (y.shape[0], 1, 1))
    return y * kept.astype(y.dtype) / (1 - rate)
