"""The Vision Transformer that all methods use."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.models.attention import Attention, AttentionParts, LayerPositions
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.block import Scale, encoder_block
from vitcomp_jax.models.heads import HEADS, MapHead
from vitcomp_jax.models.layers import (
  MLPS,
  NORMS,
  LayerNorm,
  LayerScale,
  Mlp,
  PatchEmbed,
  RMSNorm,
  identity,
)
from vitcomp_jax.models.positions import POSITIONS, RelativeBias, RotaryAngles
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Tokens

_token_init = nn.initializers.normal(1e-6)


class ViT(Backbone):
  """A Vision Transformer: prefix and patch tokens, positions, layers, and a head."""

  def setup(self) -> None:
    spec = self.spec
    patch_norm = spec.norm_spec(spec.patch_norm)
    self.patch_embed = PatchEmbed(
      spec.patch_size, spec.width, spec.dtype, spec.patch_bias, patch_norm
    )
    counts = {
      "cls_token": spec.class_token,
      "dist_token": spec.distilled,
      "reg_token": spec.num_registers,
    }
    self.prefix = [
      self.param(name, _token_init, (1, int(n), spec.width)) for name, n in counts.items() if n
    ]
    # Positions and head put their parameters in this module's scope, to get timm's names.
    self.positions = POSITIONS[spec.positions](spec)
    nn.share_scope(self, self.positions)
    if spec.rotary is not None:
      self.rope = RotaryAngles(spec)
    if spec.relative_bias == "shared":
      self.rel_pos_bias = RelativeBias(spec.grid, spec.num_heads)
    self.norm_pre = spec.norm_spec(spec.norm_pre).make()
    parts = ViTParts(spec)
    self.blocks = [encoder_block(layer, parts, self.remat) for layer in self.layers]
    self.pool = HEADS[spec.pool](spec)
    nn.share_scope(self, self.pool)

  def embed(self, images: Array) -> Tokens:
    spec, b = self.spec, images.shape[0]
    x = self.patch_embed(images)
    prefix = [jnp.broadcast_to(t, (b, *t.shape[1:])).astype(x.dtype) for t in self.prefix]
    x = self.positions(jnp.concatenate([*prefix, x[:, :0]], axis=1), x)
    tracks_origin = spec.rotary is not None or spec.relative_bias is not None
    return Tokens.begin(
      self.norm_pre(x), spec.num_prefix, probe=self._probe(), track_origin=tracks_origin
    )

  def encode(self, layer: int, tokens: Tokens) -> Tokens:
    return self.blocks[layer](tokens, self.layer_positions(layer))

  def layer_positions(self, layer: int) -> LayerPositions | None:
    """Returns the positions that a layer's attention uses; None if it uses none."""
    spec = self.spec
    if spec.rotary is not None:
      return LayerPositions(angles=self.rope(layer), halves=spec.rotary.halves)
    if spec.relative_bias == "shared":
      return LayerPositions(bias=self.rel_pos_bias())
    return None

  def classify(self, tokens: Tokens) -> tuple[Tokens, Array, Array]:
    return self.pool(tokens)

  def _probe(self) -> Array | None:
    """Returns the pooling query, f[h d]; None unless a reducer ranks by `pool_query`."""
    if not any(getattr(layer.reduce, "importance", None) == "pool_query" for layer in self.layers):
      return None
    assert isinstance(self.pool, MapHead), "pool_query needs a pooling head"
    return self.pool.probe()


@dataclasses.dataclass(frozen=True)
class ViTParts:
  """Makes the parts of a ViT's layers.

  Attributes:
    spec: The model.
  """

  spec: ViTSpec

  @property
  def norm_after(self) -> bool:
    return self.spec.norm_after

  def norm(self) -> LayerNorm | RMSNorm:
    return NORMS[self.spec.norm](self.spec.norm_eps)

  def attention(self, layer: LayerSpec) -> Attention:
    spec = self.spec
    parts = AttentionParts(
      qkv_bias=spec.qkv_bias,
      proj_bias=spec.linear_bias,
      qk_norm=spec.norm_spec(spec.qk_norm),
      norm=spec.norm_spec(spec.attn_norm),
      relative_grid=spec.grid if spec.relative_bias == "layer" else None,
    )
    return Attention(layer, spec.width, spec.dtype, spec.attention, parts)

  def mlp(self, layer: LayerSpec) -> Mlp:
    spec = self.spec
    norm = spec.norm_spec(spec.mlp_norm)
    sizes = layer.mlp_dim, spec.width
    return MLPS[spec.mlp](*sizes, spec.dtype, spec.activation, spec.linear_bias, norm)

  def scales(self, layer: LayerSpec, branch: int) -> tuple[Scale, Scale]:
    scale = LayerScale(self.spec.width, name=f"ls{branch}") if layer.layer_scale else identity
    return identity, scale
