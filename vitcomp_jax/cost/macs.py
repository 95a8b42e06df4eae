"""Counts multiply-accumulates, for reports (ints) and for the budget loss (traced).

Counting follows the papers, whose "GFLOPs" are 1e9 multiply-accumulates: matrix products and the
patch embedding count, the latter for prefix tokens too; norms, biases, softmax and matching do not.
"""

from collections.abc import Sequence
from typing import Any

from vitcomp_jax.models.heads import HEADS
from vitcomp_jax.models.layer_spec import Widths
from vitcomp_jax.models.spec import LayerSpec, ViTSpec


def layer_macs(
  layer: LayerSpec,
  width: int,
  at_attention: Any,
  at_mlp: Any,
  widths: Widths | None = None,
) -> Any:
  """Counts the multiply-accumulates of one layer, per image.

  Args:
    layer: Spec of the layer.
    width: Channels of a token.
    at_attention: Tokens that enter attention, an int or a traced scalar.
    at_mlp: Tokens that enter the MLP, an int or a traced scalar.
    widths: Widths of the layer, numbers or traced scalars; None: those of its spec.
  """
  qk, value, hidden = layer.widths if widths is None else widths
  inner = 1.0 * (qk + value)
  attention = at_attention * (2.0 * width * inner) + at_attention * at_attention * inner
  projections = 3.0 if layer.is_gated else 2.0
  return attention + at_mlp * (projections * width * hidden)


def macs(
  spec: ViTSpec,
  layers: Sequence[LayerSpec],
  counts: Sequence[tuple[Any, Any]],
  widths: Sequence[Widths] | None = None,
) -> Any:
  """Counts the multiply-accumulates of a forward pass, per image.

  Args:
    spec: Spec of the model.
    layers: Layers of the model.
    counts: Tokens at attention and at the MLP of each layer, ints or traced scalars.
    widths: Widths of each layer, numbers or traced scalars; None: those of their specs.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Eq. 8.
  """
  if widths is None:
    widths = [layer.widths for layer in layers]
  total = sum(
    layer_macs(layer, spec.width_at(i), *count, of_layer)
    for i, (layer, count, of_layer) in enumerate(zip(layers, counts, widths, strict=True))
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
