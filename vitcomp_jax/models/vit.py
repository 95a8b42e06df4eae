"""The Vision Transformer that serves every method."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.layers import (
  AttentionPool,
  EncoderBlock,
  LayerNorm,
  PatchEmbed,
  dense,
)
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output, Tokens

_position_init = nn.initializers.truncated_normal(0.02)


class ViT(nn.Module):
  """A Vision Transformer; `layers` says what each layer is and what it removes.

  Attributes:
    spec: The model.
    layers: Its layers, `spec.dense_layers` or compressed ones.
    remat: Compute a layer's activations again in the backward pass, instead of keeping them.
  """

  spec: ViTSpec
  layers: tuple[LayerSpec, ...]
  remat: bool = False

  def setup(self) -> None:
    spec = self.spec
    self.patch_embed = PatchEmbed(spec.patch_size, spec.width, spec.dtype, not spec.norm_pre)
    if spec.class_token:
      self.cls_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, spec.width))
    if spec.distilled:
      self.dist_token = self.param("dist_token", nn.initializers.normal(1e-6), (1, 1, spec.width))
    if spec.num_registers:
      shape = (1, spec.num_registers, spec.width)
      self.reg_token = self.param("reg_token", nn.initializers.normal(1e-6), shape)
    positions = (1, spec.pos_prefix + spec.num_patches, spec.width)
    self.pos_embed = self.param("pos_embed", _position_init, positions)
    if spec.norm_pre:
      self.norm_pre = LayerNorm(spec.norm_eps)
    self.blocks = [encoder_block(spec, layer, self.remat) for layer in self.layers]
    if spec.pool == "size_mean":
      self.fc_norm = LayerNorm(spec.norm_eps)
    else:
      self.norm = LayerNorm(spec.norm_eps)
    if spec.pool == "map":
      sizes = spec.num_heads, spec.mlp_dim, spec.width
      self.attn_pool = AttentionPool(*sizes, spec.norm_eps, spec.dtype, spec.activation)
    if spec.num_classes:
      self.head = dense(spec.num_classes, spec.dtype)
      if spec.distilled:
        self.head_dist = dense(spec.num_classes, spec.dtype)

  def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
    """Logits, or pooled features where the model has no classifier."""
    return self.forward(images).logits

  def forward(self, images: Float[Array, "b h w 3"]) -> Output:
    """Returns logits, pooled features, and the tokens of every layer.

    Args:
      images: Normalised by the spec's mean and std.

    Raises:
      ValueError: If the images are not of the model's size.
    """
    if images.shape[1:3] != self.spec.image_size:
      raise ValueError(f"images: expected {self.spec.image_size} pixels, got {images.shape[1:3]}")
    tokens = self.embed(images)
    layers = []
    for i in range(len(self.layers)):
      tokens = self.encode(i, tokens)
      layers.append(tokens)
    tokens, features, logits = self.classify(tokens)
    return Output(logits, features, tokens, tuple(layers))

  def encode(self, layer: int, tokens: Tokens) -> Tokens:
    """Returns the tokens after a layer."""
    return self.blocks[layer](tokens)

  def classify(self, tokens: Tokens) -> tuple[Tokens, Array, Array]:
    """The last layer's tokens after the final norm, pooled features and logits."""
    if self.spec.pool != "size_mean":
      tokens = tokens.normed(self.norm)
    features = self._pool(tokens)
    return tokens, features, self._classify(features)

  def embed(self, images: Array) -> Tokens:
    """Patches behind the prefix, with positions."""
    spec, b = self.spec, images.shape[0]
    x = self.patch_embed(images)
    prefix = [self.cls_token] if spec.class_token else []
    prefix += [self.dist_token] if spec.distilled else []
    prefix += [self.reg_token] if spec.num_registers else []
    prefix = [jnp.broadcast_to(t, (b, *t.shape[1:])).astype(x.dtype) for t in prefix]
    positions = self.pos_embed.astype(x.dtype)
    if spec.pos_on_prefix:
      x = jnp.concatenate([*prefix, x], axis=1) + positions
    else:
      x = jnp.concatenate([*prefix, x + positions], axis=1)
    x = self.norm_pre(x) if spec.norm_pre else x
    return Tokens.begin(x, spec.num_prefix, probe=self._probe())

  def _probe(self) -> Array | None:
    """Returns the pooling query, f[h d]; None unless a reducer ranks by `pool_query`."""
    if not any(getattr(layer.reduce, "importance", None) == "pool_query" for layer in self.layers):
      return None
    if self.is_initializing():  # The head has no parameters yet.
      return jnp.zeros((self.spec.num_heads, self.spec.width))
    return self.norm.variables["params"]["scale"][None] * self.attn_pool.probe()

  def _pool(self, tokens: Tokens) -> Array:
    """[b d], or [b 2 d] with a distillation token, which has a classifier of its own."""
    if self.spec.pool == "cls":
      return tokens.x[:, 0]
    if self.spec.pool == "cls_dist":
      return tokens.x[:, :2]
    if self.spec.pool == "map":
      return self.attn_pool(tokens)
    return self.fc_norm(size_mean(tokens))

  def _classify(self, features: Array) -> Array:
    if self.spec.pool == "cls_dist":
      if not self.spec.num_classes:
        return jnp.mean(features, axis=1)
      return (self.head(features[:, 0]) + self.head_dist(features[:, 1])) / 2
    return self.head(features) if self.spec.num_classes else features


def encoder_block(
  spec: ViTSpec,
  layer: LayerSpec,
  remat: bool = False,
  width: int | None = None,
  kind: type[EncoderBlock] = EncoderBlock,
) -> EncoderBlock:
  """One layer of a model, as a module of its own."""
  return (nn.remat(kind) if remat else kind)(
    layer,
    width or spec.width,
    spec.norm_eps,
    layer.select,
    layer.reduce,
    layer.token_gate,
    layer.head_gate,
    layer.hidden_gate,
    spec.dtype,
    spec.attention,
    spec.activation,
  )


def size_mean(tokens: Tokens) -> Float[Array, "b d"]:
  """Mean over the patch tokens, each weighing as much as the patches it stands for.

  The denominator takes no gradient, as in the authors' model for MAE weights.
  """
  x = tokens.x[:, tokens.num_prefix :]
  weight = jnp.ones((*x.shape[:2], 1), x.dtype)
  for factor in (tokens.size, tokens.keep):
    if factor is not None:
      weight = weight * factor[:, tokens.num_prefix :, None].astype(x.dtype)
  return jnp.sum(weight * x, axis=1) / jax.lax.stop_gradient(jnp.sum(weight, axis=1))
