"""DynamicViT: small networks between the layers learn which tokens to keep.

Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, NeurIPS 2021. What it learns are
weights, so it has no search: a plan with prediction modules is trained by the stage `finetune`.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.predictor import PredictorMask, PredictorSelect
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output, Tokens

RATIO_WEIGHT = 2.0  # the authors', of the mean over the places


def training_layers(layers: tuple[LayerSpec, ...], mask_eps: float = 0.0) -> tuple[LayerSpec, ...]:
  """Layers that mask tokens at random, as their prediction modules say.

  Args:
    layers: Static ones, with prediction modules.
    mask_eps: Smoothing of the masked softmax; the authors': 1e-6.
  """
  return tuple(
    dataclasses.replace(
      layer,
      select=PredictorMask() if isinstance(layer.select, PredictorSelect) else layer.select,
      mask_eps=mask_eps,
    )
    for layer in layers
  )


def places(layers: tuple[LayerSpec, ...]) -> list[int]:
  """The layers that have a prediction module."""
  return [i for i, layer in enumerate(layers) if isinstance(layer.select, PredictorSelect)]


def ratio_loss(spec: ViTSpec, layers: tuple[LayerSpec, ...], out: Output) -> Float[Array, ""]:
  """How far the share of patches that an image keeps is from the ratio (Eq. 12).

  Args:
    spec: The model.
    layers: The static ones, which know the ratios.
    out: Of the training layers.

  Returns:
    The squared difference, a mean over the images and a sum over the places.
  """
  total = jnp.zeros((), out.tokens.x.dtype)
  for layer, tokens in zip(layers, out.layers, strict=True):
    if isinstance(layer.select, PredictorSelect) and tokens.keep is not None:
      share = jnp.mean(tokens.keep[:, spec.num_prefix :], axis=1)
      total = total + jnp.mean((share - layer.select.ratio) ** 2)
  return total


def token_distance(tokens: Tokens, teacher: Tokens) -> Float[Array, ""]:
  """Mean squared distance of the kept patch tokens from a teacher's (Eq. 10).

  Args:
    tokens: After the last layer, masked ones still in place.
    teacher: The dense model's.
  """
  prefix = tokens.num_prefix
  square = jnp.mean((tokens.x - teacher.x)[:, prefix:] ** 2, axis=2)
  keep = jnp.ones_like(square) if tokens.keep is None else tokens.keep[:, prefix:]
  return jnp.sum(square * keep) / jnp.maximum(jnp.sum(keep), 1)
