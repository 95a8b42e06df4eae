"""Counts multiply-accumulates, for reports (ints) and for the budget loss (traced).

The papers' rule is used, whose "GFLOPs" are 1e9 multiply-accumulates: matrix products and the patch
embedding count, the latter also for prefix tokens; norms, biases, softmax and matching do not.
"""

from collections.abc import Sequence
from typing import Any

from vitcomp_jax.models.heads import HEADS
from vitcomp_jax.models.spec import LayerSpec, ViTSpec


def layer_macs(layer: LayerSpec, width: int, at_attention: Any, at_mlp: Any) -> Any:
  """Counts the multiply-accumulates of one layer, per image.

  Args:
    layer: Spec of the layer, of which the widths are used.
    width: Channels of a token.
    at_attention: Tokens that enter attention, an int or a traced scalar.
    at_mlp: Tokens that enter the MLP, an int or a traced scalar.
  """
  inner = layer.num_heads * layer.head_dim
  attention = at_attention * (4.0 * width * inner) + at_attention * at_attention * (2.0 * inner)
  projections = 3.0 if layer.is_gated else 2.0
  return attention + at_mlp * (projections * width * layer.mlp_dim)


def macs(spec: ViTSpec, layers: Sequence[LayerSpec], counts: Sequence[tuple[Any, Any]]) -> Any:
  """Counts the multiply-accumulates of a forward pass, per image.

  Args:
    spec: Spec of the model.
    layers: Layers of the model.
    counts: Tokens at attention and at the MLP of each layer, ints or traced scalars.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Eq. 8.
  """
  total = sum(
    layer_macs(layer, spec.width_at(i), *count)
    for i, (layer, count) in enumerate(zip(layers, counts, strict=True))
  )
  last = counts[-1][1] if counts else spec.num_tokens
  pooling, classifier = HEADS[spec.pool].macs(spec, last)
  return total + pooling + float(spec.embed_macs + classifier)


def static_counts(spec: ViTSpec, layers: Sequence[LayerSpec]) -> list[tuple[int, int]]:
  """Counts the tokens at attention and at the MLP of each layer, for static reducers.

  Args:
    spec: Spec of the model.
    layers: Layers of the model.
  """
  counts, n = [], 0
  for i, layer in enumerate(layers):
    at_attention = layer.select.count(spec.starts.get(i, n))
    n = layer.reduce.count(at_attention)
    counts.append((at_attention, n))
  return counts


def static_macs(spec: ViTSpec, layers: Sequence[LayerSpec]) -> float:
  """Counts the multiply-accumulates of a model whose reducers are static, per image."""
  return float(macs(spec, layers, static_counts(spec, layers)))
