"""DynamicViT: small networks between the layers learn which tokens to keep.

Rao et al., `DynamicViT <https://arxiv.org/abs/2106.02034>`_, NeurIPS 2021.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.models.predictor import PredictorMask, PredictorSelect
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output


@dataclasses.dataclass(frozen=True)
class DynamicViT:
  """The method.

  Attributes:
    places: Layers before which tokens are dropped.
    ratios: Share of all patches that each of them keeps.
    ratio_weight: Of the mean over the places of the ratio loss.
    mask_eps: Smoothing of the masked softmax; the authors': 1e-6.
  """

  places: tuple[int, ...]
  ratios: tuple[float, ...]
  ratio_weight: float = 2.0
  mask_eps: float = 0.0

  def layers(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Layers that mask tokens at random, as often as their prediction modules say."""
    return tuple(
      dataclasses.replace(
        layer,
        select=PredictorMask() if i in self.places else layer.select,
        mask_eps=self.mask_eps,
      )
      for i, layer in enumerate(spec.dense_layers)
    )

  def initial_arch(self, spec: ViTSpec) -> dict[str, Any]:
    """Nothing: the prediction modules are weights."""
    return {}

  def penalty(
    self, spec: ViTSpec, arch: Mapping[str, Any], out: Output, step: Array
  ) -> tuple[Array, dict[str, Array]]:
    """The ratio loss (Eq. 12), weighted, and the shares that are kept."""
    loss = self.ratio_loss(spec, out)
    weight = self.ratio_weight / len(self.places)
    return weight * loss, {"ratio_loss": loss, "kept": jnp.mean(self._kept(spec, out), axis=1)}

  def ratio_loss(self, spec: ViTSpec, out: Output) -> Array:
    """Squared distance of the share kept of each image from the ratio, summed over the places."""
    ratios = jnp.asarray(self.ratios, out.tokens.x.dtype)[:, None]
    return jnp.sum(jnp.mean((self._kept(spec, out) - ratios) ** 2, axis=1))

  def _kept(self, spec: ViTSpec, out: Output) -> Array:
    """Share of patches that each place keeps, f[places b]."""
    masks = [out.layers[place].keep for place in self.places]
    return jnp.stack([jnp.mean(m[:, spec.num_prefix :], axis=1) for m in masks if m is not None])

  def deploy(self, spec: ViTSpec) -> tuple[LayerSpec, ...]:
    """Layers that keep the patches with the highest scores."""
    return layers(spec, self.places, self.ratios)


def layers(spec: ViTSpec, places: Sequence[int], ratios: Sequence[float]) -> tuple[LayerSpec, ...]:
  """Static layers; each place keeps a share of all patches, rounded down."""
  kept = {p: int(spec.num_patches * r) for p, r in zip(places, ratios, strict=True)}
  return tuple(
    dataclasses.replace(layer, select=PredictorSelect(kept[i] + spec.num_prefix))
    if i in kept
    else layer
    for i, layer in enumerate(spec.dense_layers)
  )
