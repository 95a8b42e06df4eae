"""Slices a masked network into a smaller one with the same outputs.

Kept units are gathered into smaller kernels. Heads without a kept dimension are removed; the others
are padded with zeros to the widest head of their layer. Padding does not change outputs: zero
queries multiply zero keys, and zero values multiply zero rows of the projection.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Params = dict[str, Any]
_TABLE = "relative_position_bias_table"  # one column for each head


@dataclasses.dataclass(frozen=True)
class LayerIndex:
  """Holds the indices of a slimmed layer's units in the dense layer; -1 for padding.

  Attributes:
    attn: Index `head * head_dim + dimension` in the dense layer, for each head and dimension.
    mlp: Index in the dense layer, for each hidden unit.
  """

  attn: tuple[tuple[int, ...], ...]
  mlp: tuple[int, ...]

  @property
  def widths(self) -> dict[str, int]:
    """Returns the slimmed layer's widths, by their names in `LayerSpec`."""
    dims = len(self.attn[0]) if self.attn else 0
    return {"num_heads": len(self.attn), "head_dim": dims, "mlp_dim": len(self.mlp)}

  def rotated(self, head_dim: int, pairing: str) -> tuple[tuple[int, ...], ...]:
    """Returns, for each kept pair, its index in the dense layer, `head * pairs + pair`.

    Args:
      head_dim: Dimensions of a head in the dense layer.
      pairing: Which dimensions are rotated together, see `LayerSpec`.
    """
    found = []
    for head in self.attn:
      firsts = head[: len(head) // 2] if pairing == "halves" else head[::2]
      pairs = [_pair(unit, head_dim, pairing) for unit in firsts]
      found.append(tuple(pairs))
    return tuple(found)


def _pair(unit: int, head_dim: int, pairing: str) -> int:
  head, dim = divmod(max(unit, 0), head_dim)
  return head * (head_dim // 2) + (dim if pairing == "halves" else dim // 2)


def layer_index(
  attn: np.ndarray, mlp: np.ndarray, tile: int = 1, pairing: str | None = None
) -> LayerIndex:
  """Returns the indices of a layer's kept units.

  Args:
    attn: bool[h k], kept dimensions of each head. Of two that are rotated together, both are kept
      or neither.
    mlp: bool[m], kept hidden units.
    tile: Multiple to which head dimensions and hidden units are padded.
    pairing: Which dimensions are rotated together, see `LayerSpec`.
  """
  num_dims = attn.shape[1]
  heads = [np.flatnonzero(row) + i * num_dims for i, row in enumerate(attn) if row.any()]
  width = _round_up(max(map(len, heads), default=0), tile if pairing is None else math.lcm(tile, 2))
  parts = 2 if pairing == "halves" else 1
  filled = []
  for head in heads:
    halves = [_filled(half, width // parts) for half in np.split(head, parts)]
    filled.append(sum(halves, ()))
  hidden = np.flatnonzero(mlp)
  return LayerIndex(tuple(filled), _filled(hidden, _round_up(hidden.size, tile)))


def _filled(index: np.ndarray, width: int) -> tuple[int, ...]:
  return (*index.tolist(), *(-1,) * (width - index.size))


def _round_up(count: int, tile: int) -> int:
  return -(-count // tile) * tile


def slice_params(params: Mapping[str, Any], indices: Sequence[LayerIndex]) -> Params:
  """Returns the parameters of the slimmed network, gathered from the dense network's.

  Args:
    params: Parameters of the dense network.
    indices: Kept units of each layer.
  """
  blocks = {
    f"blocks_{i}": _slice_block(params[f"blocks_{i}"], index) for i, index in enumerate(indices)
  }
  return {**params, **blocks}


def _slice_block(block: Mapping[str, Any], index: LayerIndex) -> Params:
  """Returns a layer's parameters for the kept units; norms within heads stay unchanged."""
  attn, dims = block["attn"], np.ravel(index.attn)
  sliced = dict(attn) | {
    "qkv": {name: _gather_qkv(value, dims) for name, value in attn["qkv"].items()},
    "proj": {**attn["proj"], "kernel": _gather(attn["proj"]["kernel"], dims, axis=0)},
  }
  for name in ("q_bias", "v_bias"):
    if name in attn:
      sliced[name] = _gather(attn[name], dims, axis=0)
  if _TABLE in attn:
    inner, num_heads = attn["proj"]["kernel"].shape[0], attn[_TABLE].shape[1]
    kept = [max(head) // (inner // num_heads) for head in index.attn]
    sliced[_TABLE] = _gather(attn[_TABLE], np.array(kept), axis=1)
  return {**block, "attn": sliced, "mlp": slice_mlp(block["mlp"], np.array(index.mlp))}


def slice_mlp(mlp: Mapping[str, Any], hidden: np.ndarray) -> Params:
  """Returns an MLP's parameters for some hidden units and their gates; -1 is padding."""
  down = mlp["fc2"]["kernel"]
  parts = {"fc2": {**mlp["fc2"], "kernel": _gather(down, hidden, axis=0)}}
  for name in ("fc1", "fc1_g", "fc1_x"):
    if name in mlp:
      count = mlp[name]["kernel"].shape[-1] // down.shape[0]  # 2 for gates and values in one
      parts[name] = {key: _gather_parts(v, hidden, count) for key, v in mlp[name].items()}
  return {**mlp, **parts}


def scale_qkv(block: Mapping[str, Any], factors: np.ndarray) -> Params:
  """Multiplies the queries, keys and values of a layer.

  Args:
    block: Parameters of the layer.
    factors: f[3 h k], in the order of the fused projection: all queries, keys, values.

  Returns:
    The layer's parameters with a scaled projection.
  """
  attn = dict(block["attn"])
  attn["qkv"] = {k: np.asarray(v) * factors.astype(v.dtype) for k, v in attn["qkv"].items()}
  for name, part in zip(("q_bias", "v_bias"), np.split(factors, 3)[::2], strict=True):
    if name in attn:
      attn[name] = np.asarray(attn[name]) * part.astype(attn[name].dtype)
  return {**block, "attn": attn}


def _gather_qkv(values: Any, index: np.ndarray) -> np.ndarray:
  """Gathers from queries, keys and values, which are concatenated on the last axis."""
  return _gather_parts(values, index, 3)


def _gather_parts(values: Any, index: np.ndarray, count: int) -> np.ndarray:
  """Gathers from each of `count` equal parts of the last axis."""
  parts = np.split(np.asarray(values), count, axis=-1)
  return np.concatenate([_gather(part, index, axis=-1) for part in parts], axis=-1)


def _gather(values: Any, index: np.ndarray, axis: int) -> np.ndarray:
  """Returns the values at `index` along an axis; zeros at -1."""
  found = np.take(np.asarray(values), np.maximum(index, 0), axis)
  shape = [1] * found.ndim
  shape[axis] = index.size
  return found * (index >= 0).reshape(shape).astype(found.dtype)
