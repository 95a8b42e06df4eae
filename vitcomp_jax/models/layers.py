"""The parts of an encoder layer, under timm's names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.models.tokens import AttentionStats, TokenReducer, Tokens
from vitcomp_jax.ops.activations import ACTIVATIONS
from vitcomp_jax.ops.attention import attend, attend_one
from vitcomp_jax.ops.norm import layer_norm

_kernel_init = nn.initializers.truncated_normal(0.02)


def dense(features: int, dtype: str | None, use_bias: bool = True) -> nn.Dense:
  return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=_kernel_init)


class LayerNorm(nn.Module):
  """Flax's layer norm, in at least float32, whose backward pass a CPU does in half the time."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    dtype = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype("float32")
    return layer_norm(self.epsilon, *(a.astype(dtype) for a in (x, scale, bias)))


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
    kernel = self.param("kernel", _kernel_init, (p, p, c, self.width))
    zeros = nn.initializers.zeros
    bias = self.param("bias", zeros, (self.width,)) if self.use_bias else None
    patches = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(b, (h // p) * (w // p), p * p * c)
    patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
    y = patches @ kernel.reshape(p * p * c, self.width)
    return y if bias is None else y + bias[None, None]


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection to queries, keys and values."""

  spec: LayerSpec
  width: int
  dtype: str | None = None
  form: str = "auto"
  use_bias: bool = True

  def setup(self) -> None:
    self.qkv = dense(3 * self.spec.num_heads * self.spec.head_dim, self.dtype, self.use_bias)
    self.proj = dense(self.width, self.dtype, self.use_bias)

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


class AttentionPool(nn.Module):
  """SigLIP's head: a learnt query attends to all tokens, and an MLP follows.

  A token weighs as much as the patches it stands for, and nothing where it is masked.

  Attributes:
    num_heads: Of the query; the width is divided among them.
    mlp_dim: Hidden units of the MLP.
    width: Channels of a token.
    norm_eps: As in the layers.
    dtype: As in the layers.
    activation: As in the layers.

  References:
    Zhai et al., `SigLIP <https://arxiv.org/abs/2303.15343>`_, 2023.
  """

  num_heads: int
  mlp_dim: int
  width: int
  norm_eps: float
  dtype: str | None = None
  activation: str = "gelu"

  def setup(self) -> None:
    latent_init = nn.initializers.truncated_normal(self.width**-0.5)
    self.latent = self.param("latent", latent_init, (1, 1, self.width))
    self.q, self.kv = dense(self.width, self.dtype), dense(2 * self.width, self.dtype)
    self.proj = dense(self.width, self.dtype)
    self.norm = LayerNorm(self.norm_eps)
    self.mlp = Mlp(self.mlp_dim, self.width, self.dtype, self.activation)

  def __call__(self, tokens: Tokens) -> Float[Array, "b d"]:
    k, v = (self._by_head(part) for part in jnp.split(self.kv(tokens.x), 2, axis=-1))
    q = jnp.broadcast_to(self.query().astype(k.dtype), (k.shape[0], *k.shape[1::2]))
    log_size = None if tokens.size is None else jnp.log(tokens.size)
    y = attend_one(q, k, v, self._scale, log_size, tokens.keep)
    y = self.proj(y.reshape(y.shape[0], self.width))
    return y + self.mlp(self.norm(y)[:, None])[:, 0]

  def query(self) -> Float[Array, "1 h k"]:
    """Returns the query folded through the key projection, by head."""
    return self.q(self.latent).reshape(1, self.num_heads, -1)

  def probe(self) -> Float[Array, "h d"]:
    """The query times the keys' projection: what the head looks for in a normed token."""
    keys = self.kv.variables["params"]["kernel"][:, : self.width]
    keys = keys.reshape(self.width, self.num_heads, -1)
    return self._scale * jnp.einsum("hk,dhk->hd", self.query()[0].astype(keys.dtype), keys)

  @property
  def _scale(self) -> float:
    return (self.width // self.num_heads) ** -0.5

  @nn.nowrap
  def _by_head(self, x: Array) -> Array:
    """[b n d] -> [b h n k]"""
    return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)


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
  activation: str = "gelu"

  def setup(self) -> None:
    self.norm1 = LayerNorm(self.norm_eps)
    self.attn = Attention(self.spec, self.width, self.dtype, self.attention)
    self.norm2 = LayerNorm(self.norm_eps)
    self.mlp = Mlp(self.spec.mlp_dim, self.width, self.dtype, self.activation)
    if self.spec.layer_scale:
      self.ls1, self.ls2 = LayerScale(self.width), LayerScale(self.width)

  def __call__(self, tokens: Tokens) -> Tokens:
    tokens = self.select(tokens, None)
    x = self.token_gate(self.norm1(tokens.x))
    y, stats = self.attn(x, tokens.size, tokens.keep, self.head_gate)
    y = self.ls1(y) if self.spec.layer_scale else y
    if self.spec.queries is not None:
      tokens = tokens.take(jnp.tile(jnp.arange(self.spec.queries), (y.shape[0], 1)))
    tokens = tokens.with_x(tokens.x + self._drop_path(y))
    tokens = self.reduce(tokens, stats)
    y = self.mlp(self.token_gate(self.norm2(tokens.x)), self.hidden_gate)
    y = self.ls2(y) if self.spec.layer_scale else y
    return tokens.with_x(tokens.x + self._drop_path(y))

  def _drop_path(self, y: Array) -> Array:
    """Stochastic depth: drops the branch for some images and scales it up for the others."""
    rate = self.spec.drop_path
    if not rate:
      return y
    kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - rate, (y.shape[0], 1, 1))
    return y * kept.astype(y.dtype) / (1 - rate)
