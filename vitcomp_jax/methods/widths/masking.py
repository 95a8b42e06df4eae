"""Drops the ends of sorted lists inside the dense model, differentiably and with fixed shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vitcomp_jax.methods.widths.factors import HiddenFactors, LayerFactors
from vitcomp_jax.methods.widths.lists import HIDDEN, QK, VALUE

# One mask for each list, see `sorted_lists`: 1 for the places that are kept, 0 for the others.
WidthMasks = Mapping[str, Array]


def masked_params(
  params: Mapping[str, Any], factors: Sequence[LayerFactors], masks: Sequence[WidthMasks]
) -> dict[str, Any]:
  """Returns parameters with which the dense model computes the same as a narrower one.

  Masks of ones change nothing except rounding. A gradient reaches every place of a mask, as only
  one factor of each product is masked: keys and values, but neither queries nor the projection.

  Args:
    params: Parameters of the dense model.
    factors: Factors of the dense model's layers, see `factorise`.
    masks: Masks of each layer, by list, f[length]. A missing list is kept whole, and attention is
      unchanged if both of its lists are missing.
  """
  blocks = {}
  for i, (layer, mask) in enumerate(zip(factors, masks, strict=True)):
    block = dict(params[f"blocks_{i}"])
    if HIDDEN in mask:
      assert layer.hidden is not None, "the hidden units of this model cannot be cut"
      block["mlp"] = {**block["mlp"], "fc2": _refit(block["mlp"]["fc2"], layer.hidden, mask)}
    if QK in mask or VALUE in mask:
      block["attn"] = _masked_attention(layer, mask)
    blocks[f"blocks_{i}"] = block
  return {**params, **blocks}


def _refit(fc2: Mapping[str, Any], factors: HiddenFactors, masks: WidthMasks) -> dict[str, Any]:
  """Returns fc2 refitted to the hidden units that are kept, see `HiddenFactors`."""
  dropped = (masks[HIDDEN] - 1)[:, None] * factors.front
  change = jnp.matmul(factors.back, dropped, precision=jax.lax.Precision.HIGHEST)
  kernel = fc2["kernel"]
  made = {"kernel": kernel + change.astype(kernel.dtype)}
  if "bias" in fc2:
    lost = jnp.matmul(factors.mean, change, precision=jax.lax.Precision.HIGHEST)
    made["bias"] = fc2["bias"] - lost.astype(fc2["bias"].dtype)
  return made


def _masked_attention(layer: LayerFactors, masks: WidthMasks) -> dict[str, Any]:
  """Returns the rotated attention with masked keys and values; a bias absorbs the lost means."""
  attn = dict(layer.attn)
  inner = attn["proj"]["kernel"].shape[0]
  keys = values = jnp.ones(inner)
  if QK in masks:
    assert layer.qk_rank is not None, "the queries and keys of this model cannot be cut"
    keys = masks[QK][layer.qk_rank].ravel()
  if VALUE in masks:
    assert layer.value_mean is not None, "the values of this model cannot be cut"
    values = jnp.tile(masks[VALUE], len(layer.value_mean))
    if "bias" in attn["proj"]:
      lost = jnp.ravel(layer.value_mean) * (1 - values)
      bias = jnp.matmul(lost, attn["proj"]["kernel"], precision=jax.lax.Precision.HIGHEST)
      attn["proj"] = {**attn["proj"], "bias": attn["proj"]["bias"] + bias}
  factors = jnp.concatenate([jnp.ones(inner), keys, values])
  attn["qkv"] = {k: v * jnp.expand_dims(factors, range(v.ndim - 1)) for k, v in attn["qkv"].items()}
  if "v_bias" in attn:
    attn["v_bias"] = attn["v_bias"] * values
  return attn
