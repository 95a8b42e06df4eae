"""Builds the module that a spec describes."""

import dataclasses

from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.caformer import CAFormer, CAFormerSpec
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.vit import ViT


def build(spec: ViTSpec, layers: tuple[LayerSpec, ...], remat: bool = False) -> Backbone:
  """Builds a model.

  Args:
    spec: The model.
    layers: Layers of the model, `spec.dense_layers` or compressed ones.
    remat: Whether the backward pass recomputes activations, see `Backbone`.
  """
  return (CAFormer if isinstance(spec, CAFormerSpec) else ViT)(spec, layers, remat)


def portable(model: Backbone) -> Backbone:
  """Returns the same model without cuDNN's kernel, for any platform and format."""
  return build(dataclasses.replace(model.spec, attention="xla"), model.layers)
