"""Slices a masked network into a smaller one with the same outputs.

Kept units are gathered into smaller kernels. Heads without a kept dimension are removed; the others
are padded with zeros to the widest of their layer. Padding changes no output: a zero query meets a
zero key, and a zero value meets zero rows of the projection.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Params = dict[str, Any]


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


def layer_index(attn: np.ndarray, mlp: np.ndarray, tile: int = 1) -> LayerIndex:
  """Returns the indices of a layer's kept units.

  Args:
    attn: bool[h k], kept dimensions of each head.
    mlp: bool[m], kept hidden units.
    tile: Head dimensions and hidden units are padded to a multiple of it.
  """
  num_dims = attn.shape[1]
  heads = [np.flatnonzero(row) + i * num_dims for i, row in enumerate(attn) if row.any()]
  width = _round_up(max(map(len, heads), default=0), tile)
  hidden = np.flatnonzero(mlp)
  return LayerIndex(
    tuple(_filled(head, width) for head in heads), _filled(hidden, _round_up(hidden.size, tile))
  )


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
  attn, mlp = np.ravel(index.attn), np.array(index.mlp)
  qkv, proj = block["attn"]["qkv"], block["attn"]["proj"]
  fc1, fc2 = block["mlp"]["fc1"], block["mlp"]["fc2"]
  return {
    **block,
    "attn": {
      "qkv": {name: _gather_qkv(value, attn) for name, value in qkv.items()},
      "proj": {**proj, "kernel": _gather(proj["kernel"], attn, axis=0)},
    },
    "mlp": {
      "fc1": {name: _gather(value, mlp, axis=-1) for name, value in fc1.items()},
      "fc2": {**fc2, "kernel": _gather(fc2["kernel"], mlp, axis=0)},
    },
  }


def scale_qkv(block: Mapping[str, Any], factors: np.ndarray) -> Params:
  """Multiplies the queries, keys and values of a layer.

  Args:
    block: Parameters of the layer.
    factors: f[3 h k], in the order of the fused projection: all queries, keys, values.

  Returns:
    The layer's parameters with a scaled projection.
  """
  attn = block["attn"]
  qkv = {k: np.asarray(v) * factors.astype(v.dtype) for k, v in attn["qkv"].items()}
  return {**block, "attn": {**attn, "qkv": qkv}}


def _gather_qkv(values: Any, index: np.ndarray) -> np.ndarray:
  """Gathers from queries, keys and values, which are concatenated on the last axis."""
  q, k, v = np.split(np.asarray(values), 3, axis=-1)
  return np.concatenate([_gather(part, index, axis=-1) for part in (q, k, v)], axis=-1)


def _gather(values: Any, index: np.ndarray, axis: int) -> np.ndarray:
  """Returns the values at `index` along an axis; zeros at -1."""
  found = np.take(np.asarray(values), np.maximum(index, 0), axis)
  shape = [1] * found.ndim
  shape[axis] = index.size
  return found * (index >= 0).reshape(shape).astype(found.dtype)
