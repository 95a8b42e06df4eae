"""One encoder layer, built from a backbone's parts."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.models.attention import Attention, LayerPositions
from vitcomp_jax.models.gates import Gate
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.models.tokens import TokenReducer, Tokens

Scale = Callable[[Array], Array]


@runtime_checkable
class BlockParts(Protocol):
  """Makes the parts of a layer. It must be hashable, as it is a field of a module."""

  @property
  def norm_after(self) -> bool:
    """Returns whether the norms follow attention and MLP instead of preceding them."""
    ...

  def norm(self) -> nn.Module:
    """Makes the norm before attention, or before the MLP."""
    ...

  def attention(self, layer: LayerSpec) -> Attention:
    """Makes the attention."""
    ...

  def mlp(self, layer: LayerSpec) -> nn.Module:
    """Makes the MLP, a function of the tokens and the gate on its hidden units."""
    ...

  def scales(self, layer: LayerSpec, branch: int) -> tuple[Scale, Scale]:
    """Makes the scales of the residual stream and of residual branch 1 or 2."""
    ...


class EncoderBlock(nn.Module):
  """An encoder layer that may reduce its tokens before and after attention."""

  layer: LayerSpec
  parts: BlockParts
  # Separate fields, so that Flax registers those that are modules.
  select: TokenReducer
  reduce: TokenReducer
  token_gate: Gate
  head_gate: Gate
  hidden_gate: Gate

  def setup(self) -> None:
    parts, layer = self.parts, self.layer
    self.norm1, self.norm2 = parts.norm(), parts.norm()
    self.attn, self.mlp = parts.attention(layer), parts.mlp(layer)
    self.stream1, self.branch1 = parts.scales(layer, 1)
    self.stream2, self.branch2 = parts.scales(layer, 2)

  def __call__(self, tokens: Tokens, positions: LayerPositions | None = None) -> Tokens:
    """Returns the tokens after the layer.

    Args:
      tokens: The tokens that enter the layer.
      positions: Positions that attention uses, see `Attention`.
    """
    tokens = self.select(tokens, None)
    x = self.token_gate(self._before(self.norm1, tokens.x))
    y, stats = self.attn(x, tokens, self.head_gate, positions)
    if self.layer.queries is not None:
      tokens = tokens.take(jnp.tile(jnp.arange(self.layer.queries), (y.shape[0], 1)))
    y = self.branch1(self._after(self.norm1, y))
    tokens = tokens.with_x(self.stream1(tokens.x) + self._drop_path(y))
    tokens = self.reduce(tokens, stats)
    y = self.mlp(self.token_gate(self._before(self.norm2, tokens.x)), self.hidden_gate)
    y = self.branch2(self._after(self.norm2, y))
    return tokens.with_x(self.stream2(tokens.x) + self._drop_path(y))

  def _before(self, norm: Scale, x: Array) -> Array:
    return x if self.parts.norm_after else norm(x)

  def _after(self, norm: Scale, y: Array) -> Array:
    return norm(y) if self.parts.norm_after else y

  def _drop_path(self, y: Array) -> Array:
    """Drops the branch for some images and scales it up for the others (stochastic depth)."""
    rate = self.layer.drop_path
    if not rate:
      return y
    kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - rate, (y.shape[0], 1, 1))
    return y * kept.astype(y.dtype) / (1 - rate)


def encoder_block(layer: LayerSpec, parts: BlockParts, remat: bool = False) -> EncoderBlock:
  """Makes one layer.

  Args:
    layer: The layer's spec.
    parts: Factory of the layer's parts.
    remat: Whether the backward pass recomputes activations, see `Backbone`.
  """
  gates = layer.token_gate, layer.head_gate, layer.hidden_gate
  block = nn.remat(EncoderBlock) if remat else EncoderBlock
  return block(layer, parts, layer.select, layer.reduce, *gates)
