"""The Vision Transformer that serves every method."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.models.attention import Attention
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.block import Scale, encoder_block
from vitcomp_jax.models.heads import HEADS, MapHead
from vitcomp_jax.models.layers import LayerNorm, LayerScale, Mlp, PatchEmbed, identity
from vitcomp_jax.models.positions import POSITIONS
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Tokens

_token_init = nn.initializers.normal(1e-6)


class ViT(Backbone):
  """A Vision Transformer: prefix and patch tokens, positions, layers, and a head."""

  def setup(self) -> None:
    spec = self.spec
    self.patch_embed = PatchEmbed(spec.patch_size, spec.width, spec.dtype, not spec.norm_pre)
    counts = {
      "cls_token": spec.class_token,
      "dist_token": spec.distilled,
      "reg_token": spec.num_registers,
    }
    self.prefix = [
      self.param(name, _token_init, (1, int(n), spec.width)) for name, n in counts.items() if n
    ]
    # Positions and head put their parameters in this module's scope, for timm's names.
    self.positions = POSITIONS[spec.positions](spec)
    nn.share_scope(self, self.positions)
    self.norm_pre = LayerNorm(spec.norm_eps) if spec.norm_pre else identity
    parts = ViTParts(spec)
    self.blocks = [encoder_block(layer, parts, self.remat) for layer in self.layers]
    self.pool = HEADS[spec.pool](spec)
    nn.share_scope(self, self.pool)

  def embed(self, images: Array) -> Tokens:
    spec, b = self.spec, images.shape[0]
    x = self.patch_embed(images)
    prefix = [jnp.broadcast_to(t, (b, *t.shape[1:])).astype(x.dtype) for t in self.prefix]
    x = self.positions(jnp.concatenate([*prefix, x[:, :0]], axis=1), x)
    return Tokens.begin(self.norm_pre(x), spec.num_prefix, probe=self._probe())

  def encode(self, layer: int, tokens: Tokens) -> Tokens:
    return self.blocks[layer](tokens)

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

  def norm(self) -> LayerNorm:
    return LayerNorm(self.spec.norm_eps)

  def attention(self, layer: LayerSpec) -> Attention:
    return Attention(layer, self.spec.width, self.spec.dtype, self.spec.attention)

  def mlp(self, layer: LayerSpec) -> Mlp:
    return Mlp(layer.mlp_dim, self.spec.width, self.spec.dtype, self.spec.activation)

  def scales(self, layer: LayerSpec, branch: int) -> tuple[Scale, Scale]:
    scale = LayerScale(self.spec.width, name=f"ls{branch}") if layer.layer_scale else identity
    return identity, scale
