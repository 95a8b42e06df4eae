"""Multi-head self-attention of one layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.gates import Gate, open_gate
from vitcomp_jax.models.layers import dense
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops.attention import attend


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
    self, x: Float[Array, "b n d"], tokens: Tokens, gate: Gate = open_gate
  ) -> tuple[Float[Array, "b q d"], AttentionStats]:
    """Returns the attention's output, and statistics for reducers.

    Args:
      x: Normed token values.
      tokens: The tokens, for their sizes and mask.
      gate: Factor on queries, keys and values.
    """
    b, n, _ = x.shape
    s = self.spec
    # Split first, so that a backward pass concatenates the three gradients without a transpose.
    # Heads are next to the batch: each product is one batched matrix product.
    q, k, v = (
      gate(part.reshape(1, b, n, s.num_heads, s.head_dim).swapaxes(2, 3))[0]
      for part in jnp.split(self.qkv(x), 3, axis=-1)
    )
    log_size = jnp.log(tokens.size) if s.size_bias and tokens.size is not None else None
    q = q[:, :, : s.queries]
    y = attend(q, k, v, s.qk_scale, log_size, tokens.keep, s.mask_eps, self.form)
    y = y.transpose(0, 2, 1, 3).reshape(b, q.shape[2], s.num_heads * s.head_dim)
    return self.proj(y), AttentionStats(q, k, v, log_size, tokens.keep, s.qk_scale)
