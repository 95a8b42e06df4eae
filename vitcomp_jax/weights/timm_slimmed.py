"""Slimmed networks for timm's own `VisionTransformer`, which has one width for all layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.weights.slicing import LayerIndex, scale_qkv


def arguments(indices: Sequence[LayerIndex], width: int) -> dict[str, Any] | None:
  """Returns the arguments of timm's `VisionTransformer` for a slimmed network's widths.

  Args:
    indices: What each layer keeps.
    width: Channels of a token.

  Returns:
    `num_heads` and `mlp_ratio`, and `attn_head_dim`, which timm 1.0.31's `Attention` takes; none
    where the layers differ, as timm cannot hold such a network.
  """
  if len({tuple(index.widths.values()) for index in indices}) > 1:
    return None
  heads, head_dim, mlp_dim = indices[0].widths.values()
  ratio = mlp_dim / width
  if int(width * ratio) != mlp_dim:  # which is how timm counts its hidden units
    ratio = (mlp_dim + 0.5) / width
  return {"num_heads": heads, "mlp_ratio": ratio, "attn_head_dim": head_dim}


def rescale(params: Mapping[str, Any], head_dim: int, slimmed_head_dim: int) -> dict[str, Any]:
  """Parameters for timm, which scales attention by the slimmed head's size and not the dense one's.

  Args:
    params: Of the slimmed network.
    head_dim: Dimensions of a dense head.
    slimmed_head_dim: Of a slimmed one.

  Returns:
    The same, with the difference in the queries.
  """
  factor = math.sqrt(slimmed_head_dim / head_dim)

  def rescaled(block: Mapping[str, Any]) -> dict[str, Any]:
    q, k, v = np.split(np.ones(block["attn"]["qkv"]["kernel"].shape[-1]), 3)
    return scale_qkv(block, np.concatenate([factor * q, k, v]))

  blocks = {name: rescaled(block) for name, block in params.items() if name.startswith("blocks_")}
  return {**params, **blocks}
