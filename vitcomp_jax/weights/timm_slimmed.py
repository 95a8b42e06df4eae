"""Exports slimmed networks to timm's `VisionTransformer`, whose layers all have the same width."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.models.slicing import scale_qkv
from vitcomp_jax.models.spec import LayerSpec, ViTSpec, removes_tokens
from vitcomp_jax.weights.loading import Params


def for_timm(spec: ViTSpec, layers: Sequence[LayerSpec], params: Params) -> tuple[Params, str]:
  """Converts a network's parameters for timm's `VisionTransformer`.

  Args:
    spec: Spec of the dense model.
    layers: Layers of the network.
    params: Parameters of the network.

  Returns:
    The parameters, and a description of the timm model that they are for.

  Raises:
    UserError: If timm's model cannot represent the network.
  """
  if removes_tokens(layers):
    raise UserError("timm's VisionTransformer does not remove tokens")
  if any(layer.is_reordered for layer in layers):
    raise UserError("timm's models rotate a head's channels in their order, which this one sorts")
  if _sizes(layers) == _sizes(spec.dense_layers):
    return params, f"for timm's {spec.name}"
  if spec.naming != "vit" or spec.mlp != "mlp":
    raise UserError("only timm's VisionTransformer with a plain MLP can have other widths")
  found = arguments(layers, spec.width)
  if found is None:
    raise UserError(
      "timm's VisionTransformer has the same widths in all layers, and in queries, keys and values"
    )
  head_dim = found["attn_head_dim"]
  return (
    rescale(params, spec.width // spec.num_heads, head_dim),
    f"for timm's model with num_heads={found['num_heads']}, mlp_ratio="
    f"{found['mlp_ratio']}, attn_layer=a subclass of timm.layers.Attention with `__init__ = "
    f"functools.partialmethod(timm.layers.Attention.__init__, attn_head_dim={head_dim})`",
  )


def arguments(layers: Sequence[LayerSpec], width: int) -> dict[str, Any] | None:
  """Returns the arguments of timm's `VisionTransformer` for a slimmed network's widths.

  Args:
    layers: Layers of the network.
    width: Channels of a token.

  Returns:
    `num_heads`, `mlp_ratio` and `attn_head_dim` (of timm 1.0.31's `Attention`); None if widths
    differ between layers, or between values and queries or keys, which timm cannot represent.
  """
  (heads, head_dim, value_dim, mlp_dim), *others = set(_sizes(layers))
  if others or value_dim is not None:
    return None
  ratio = mlp_dim / width
  if int(width * ratio) != mlp_dim:  # timm's rule for the number of hidden units
    ratio = (mlp_dim + 0.5) / width
  return {"num_heads": heads, "mlp_ratio": ratio, "attn_head_dim": head_dim}


def _sizes(layers: Sequence[LayerSpec]) -> list[tuple[int, int, int | None, int]]:
  return [(layer.num_heads, layer.head_dim, layer.value_dim, layer.mlp_dim) for layer in layers]


def rescale(params: Mapping[str, Any], head_dim: int, slimmed_head_dim: int) -> Params:
  """Rescales queries for timm, which scales attention by the slimmed, not the dense, head size.

  Args:
    params: Parameters of the slimmed network.
    head_dim: Dimensions of a dense head.
    slimmed_head_dim: Dimensions of a slimmed head.

  Returns:
    The parameters, with the ratio of the two scales folded into the queries.
  """
  factor = math.sqrt(slimmed_head_dim / head_dim)

  def rescaled(block: Mapping[str, Any]) -> Params:
    q, k, v = np.split(np.ones(block["attn"]["qkv"]["kernel"].shape[-1]), 3)
    return scale_qkv(block, np.concatenate([factor * q, k, v]))

  blocks = {name: rescaled(block) for name, block in params.items() if name.startswith("blocks_")}
  return {**params, **blocks}
