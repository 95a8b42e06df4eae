"""The module that a spec describes."""

from vitcomp_jax.models.caformer import CAFormer, CAFormerSpec
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.vit import ViT


def build(spec: ViTSpec, layers: tuple[LayerSpec, ...], remat: bool = False) -> ViT:
  """A model.

  Args:
    spec: What it is.
    layers: Its layers, `spec.dense_layers` or compressed ones.
    remat: See `ViT`.
  """
  return (CAFormer if isinstance(spec, CAFormerSpec) else ViT)(spec, layers, remat)
