"""Builds the narrower network that a masked one emulates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.methods.widths.factors import LayerFactors
from vitcomp_jax.methods.widths.lists import HIDDEN, QK, VALUE, SortedList, sorted_lists
from vitcomp_jax.methods.widths.masking import masked_params
from vitcomp_jax.models.layer_spec import LayerSpec
from vitcomp_jax.models.slicing import LayerIndex, slice_mlp
from vitcomp_jax.models.spec import ViTSpec


def slimmed(
  spec: ViTSpec,
  params: Mapping[str, Any],
  factors: Sequence[LayerFactors],
  counts: Sequence[Mapping[str, int]],
) -> tuple[tuple[LayerSpec, ...], dict[str, Any]]:
  """Returns the network that keeps the first units of each list.

  It has the same outputs as the dense model with `masked_params` and masks of the same counts.

  Args:
    spec: The dense model.
    params: Parameters of the dense model.
    factors: Factors of the dense model's layers, see `factorise`.
    counts: Number of units that each layer keeps, by list; a missing list is kept whole.

  Returns:
    The layers, and the parameters as NumPy arrays. The kernel of `qkv` has the queries, then the
    keys, then the values of all heads, f[c h(2 head_dim + value_dim)].
  """
  lists = sorted_lists(spec)
  masks = [{name: _mask(lists[name], n) for name, n in layer.items()} for layer in counts]
  masked = masked_params(params, factors, masks)
  layers, made = [], {}
  for i, (full, layer, count) in enumerate(zip(spec.dense_layers, factors, counts, strict=True)):
    block = dict(masked[f"blocks_{i}"])
    changes: dict[str, Any] = {}
    if HIDDEN in count:
      assert layer.hidden is not None
      changes["mlp_dim"] = count[HIDDEN]
      block["mlp"] = slice_mlp(block["mlp"], np.asarray(layer.hidden.order)[: count[HIDDEN]])
    head_dim, value_dim = count.get(QK, full.head_dim), count.get(VALUE, full.head_dim)
    places = np.tile(np.arange(full.head_dim), (full.num_heads, 1))
    qk = _kept(places if layer.qk_rank is None else np.asarray(layer.qk_rank), head_dim)
    block["attn"] = _slice_attention(block["attn"], qk.ravel(), _kept(places, value_dim).ravel())
    if full.pairing is not None and head_dim < full.head_dim:
      index = LayerIndex(tuple(map(tuple, qk.tolist())), ())
      changes["rotated"] = index.rotated(full.head_dim, full.pairing)
    changes |= {"head_dim": head_dim, "value_dim": value_dim}
    layers.append(dataclasses.replace(full, **changes))
    made[f"blocks_{i}"] = block
  return tuple(layers), jax.tree.map(np.asarray, {**params, **made})


def _mask(units: SortedList, count: int) -> Array:
  assert 0 < count <= units.length and count % units.step == 0, f"{count} of {units}"
  return jnp.asarray(np.arange(units.length) < count, jnp.float32)


def _kept(ranks: np.ndarray, count: int) -> np.ndarray:
  """Returns the dimensions ranked below `count`, as `head * head_dim + dimension`, i[h count]."""
  return np.flatnonzero(ranks < count).reshape(len(ranks), count)


def _slice_attention(attn: Mapping[str, Any], qk: np.ndarray, value: np.ndarray) -> dict[str, Any]:
  """Returns an attention's parameters for some of its dimensions.

  Args:
    attn: Parameters of the attention.
    qk: Dimensions of queries and keys to keep, `head * head_dim + dimension`.
    value: Dimensions of values to keep, likewise.
  """
  inner = attn["proj"]["kernel"].shape[0]
  of_qkv = np.concatenate([qk, inner + qk, 2 * inner + value])
  sliced = dict(attn)
  sliced["qkv"] = {name: np.asarray(v)[..., of_qkv] for name, v in attn["qkv"].items()}
  sliced["proj"] = {**attn["proj"], "kernel": np.asarray(attn["proj"]["kernel"])[value]}
  if "q_bias" in attn:
    sliced["q_bias"] = np.asarray(attn["q_bias"])[qk]
    sliced["v_bias"] = np.asarray(attn["v_bias"])[value]
  return sliced
