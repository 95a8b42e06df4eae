"""Base class of all backbones."""

import flax.linen as nn
from jaxtyping import Array, Float

from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output, Tokens


class Backbone(nn.Module):
  """Base of models whose `layers` describe each layer and the tokens that it removes.

  A backbone embeds images as tokens, applies its layers, and classifies the last layer's tokens.

  Attributes:
    spec: The model.
    layers: Layers of the model, `spec.dense_layers` or compressed ones.
    remat: Whether the backward pass recomputes a layer's activations instead of storing them.
  """

  spec: ViTSpec
  layers: tuple[LayerSpec, ...]
  remat: bool = False

  def embed(self, images: Array) -> Tokens:
    """Returns the tokens that enter the first layer."""
    raise NotImplementedError

  def encode(self, layer: int, tokens: Tokens) -> Tokens:
    """Returns the tokens after a layer."""
    raise NotImplementedError

  def classify(self, tokens: Tokens) -> tuple[Tokens, Array, Array]:
    """Returns the last layer's tokens after the final norm, pooled features and logits."""
    raise NotImplementedError

  def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
    """Returns logits, or pooled features if the model has no classifier."""
    return self.forward(images).logits

  def forward(self, images: Float[Array, "b h w c"]) -> Output:
    """Returns logits, pooled features, and the tokens of every layer.

    Args:
      images: Images, normalised by the spec's mean and std.

    Raises:
      ValueError: If the images do not have the model's size.
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
