"""Multi-head self-attention of one layer."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.layers import NO_NORM, NormSpec, dense
from vitcomp_jax.models.positions import RelativeBias, by_origin
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops.attention import attend
from vitcomp_jax.ops.rotary import rotate


class LayerPositions(flax.struct.PyTreeNode):
  """Positions that a layer's attention uses, for all tokens that the model starts with.

  Attributes:
    angles: Angles by which queries and keys are rotated, f[#h n k//2]; None: no rotation.
    bias: Bias of the logits that layers share, f[h n n]; None: no bias.
    halves: Pairing of rotated channels, see `Rotary`.
  """

  angles: Array | None = None
  bias: Array | None = None
  halves: bool = flax.struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class AttentionParts:
  """Describes the parts of attention that differ between families of models.

  Attributes:
    qkv_bias: Which of query, key and value have a bias: `qkv`, `qv`, or ``""`` for none.
    proj_bias: Whether the last projection has a bias.
    qk_norm: Norm of each head's queries and keys.
    norm: Norm of the output before the last projection.
    relative_grid: Grid of the layer's own relative position bias; None: no such bias.
  """

  qkv_bias: str = "qkv"
  proj_bias: bool = True
  qk_norm: NormSpec = NO_NORM
  norm: NormSpec = NO_NORM
  relative_grid: tuple[int, int] | None = None


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection to queries, keys and values."""

  spec: LayerSpec
  width: int
  dtype: str | None = None
  form: str = "auto"
  parts: AttentionParts = AttentionParts()

  def setup(self) -> None:
    widths, parts = self.spec.widths, self.parts
    self.qkv = dense(2 * widths.qk + widths.value, self.dtype, parts.qkv_bias == "qkv")
    if parts.qkv_bias == "qv":
      self.q_bias = self.param("q_bias", nn.initializers.zeros, (widths.qk,))
      self.v_bias = self.param("v_bias", nn.initializers.zeros, (widths.value,))
    self.q_norm, self.k_norm = parts.qk_norm.make(), parts.qk_norm.make()
    if parts.relative_grid is not None:
      self.relative = RelativeBias(parts.relative_grid, self.spec.num_heads)
      nn.share_scope(self, self.relative)
    self.norm = parts.norm.make()
    self.proj = dense(self.width, self.dtype, parts.proj_bias)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    tokens: Tokens,
    gate: Gate = open_gate,
    positions: LayerPositions | None = None,
  ) -> tuple[Float[Array, "b q d"], AttentionStats]:
    """Returns the attention's output, and statistics for reducers.

    Args:
      x: Normalised token values.
      tokens: The tokens, which provide sizes, mask and origins.
      gate: Gate applied to queries, keys and values.
      positions: Positions of the tokens that the model starts with.
    """
    s, positions = self.spec, positions or LayerPositions()
    q, k, v = self._projected(x, gate)
    content, bias = k, self._bias(tokens, positions)
    if positions.angles is not None:
      angles = by_origin(_of_kept_pairs(positions.angles, s.rotated), tokens)
      q, k = rotate(q, angles, positions.halves), rotate(k, angles, positions.halves)
    log_size = jnp.log(tokens.size) if s.size_bias and tokens.size is not None else None
    q = q[:, :, : s.queries]
    seen = None if bias is None else bias[:, :, : s.queries]
    y = attend(q, k, v, s.qk_scale, log_size, tokens.keep, s.mask_eps, self.form, seen)
    y = y.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], s.widths.value)
    stats = AttentionStats(q, k, v, log_size, tokens.keep, s.qk_scale, seen, content)
    return self.proj(self.norm(y)), stats

  def _projected(self, x: Array, gate: Gate) -> tuple[Array, Array, Array]:
    """Returns queries and keys, f[b h n k] each, and values, f[b h n v]."""
    (b, n, _), qk = x.shape, self.spec.widths.qk
    # Splitting first lets the backward pass concatenate the three gradients without a transpose.
    # With the axis of heads next to the batch, each product is one batched matrix product.
    q, k, v = jnp.split(self.qkv(x), (qk, 2 * qk), axis=-1)
    if self.parts.qkv_bias == "qv":
      q = q + self.q_bias.astype(q.dtype)[None, None]
      v = v + self.v_bias.astype(v.dtype)[None, None]
    shape = 1, b, n, self.spec.num_heads, -1
    q, k, v = (part.reshape(shape).swapaxes(2, 3) for part in (q, k, v))
    q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
    return gate(q)[0], gate(k)[0], gate(v)[0]

  def _bias(self, tokens: Tokens, positions: LayerPositions) -> Array | None:
    """Returns the relative position bias of the logits, f[#b h n n]."""
    bias = positions.bias if self.parts.relative_grid is None else self.relative()
    if bias is None:
      return None
    rows = by_origin(bias, tokens)
    return by_origin(rows.swapaxes(2, 3), tokens).swapaxes(2, 3)


def _of_kept_pairs(angles: Array, rotated: tuple[tuple[int, ...], ...] | None) -> Array:
  """Returns the angles of the pairs that a slimmed layer keeps, f[h n k//2].

  Args:
    angles: Angles of the dense layer, f[#h n k//2].
    rotated: Kept pairs of the dense layer, see `LayerSpec`; None: all.
  """
  if rotated is None:
    return angles
  heads, _, pairs = angles.shape
  index = np.array(rotated)  # [h k//2]
  head = index // pairs if heads > 1 else np.zeros_like(index)
  return angles.swapaxes(1, 2)[head, index % pairs].swapaxes(1, 2)
