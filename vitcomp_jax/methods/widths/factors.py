"""Sorts a dense model's hidden units and head dimensions, and prepares the repair of their removal.

Everything is computed once, in double precision, from the weights and from moments on a few images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from vitcomp_jax.methods.widths.calibration import LayerMoments, Moments
from vitcomp_jax.methods.widths.elimination import importance_order
from vitcomp_jax.methods.widths.lists import HIDDEN, QK, VALUE, sorted_lists
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import ViTSpec

# Added to variances, relative to their mean: for hidden units, which may be copies of each other,
# and for the dimensions of a head.
_HIDDEN_RIDGE = 1e-4
_HEAD_RIDGE = 1e-6


class HiddenFactors(flax.struct.PyTreeNode):
  """Holds the order of an MLP's hidden units, and factors that repair the removal of the last ones.

  Let G = LLᵀ be the covariance of the units in that order. The innovations z = L⁻¹(h - mean) of the
  first K units span the same space as these units. The kernel W (m x c) of fc2 therefore becomes
  W + L⁻ᵀ diag(mask - 1) LᵀW. For a mask of ones, this is W itself; for a mask of K ones, it is the
  least-squares refit of the first K units, with zeros for the others.

  Attributes:
    order: Units, the most important first, i[m].
    back: L⁻ᵀ, f[m m]: rows are units of the dense model, columns places in the order.
    front: LᵀW, f[m c]: rows are places in the order.
    mean: Mean of each unit of the dense model, f[m]; 0 if fc2 has no bias to absorb it.
  """

  order: jax.Array | np.ndarray
  back: jax.Array | np.ndarray
  front: jax.Array | np.ndarray
  mean: jax.Array | np.ndarray


class LayerFactors(flax.struct.PyTreeNode):
  """Holds the factors by which a layer's widths are cut.

  Attributes:
    attn: Parameters of the attention as in the dense model, but with the dimensions of each head
      rotated so that the first ones are the best to keep; attention computes the same.
    hidden: Factors of the hidden units; None: they cannot be cut.
    qk_rank: Place of each dimension of a head's queries and keys in the list, i[h k]; None: they
      cannot be cut.
    value_mean: Mean of each dimension of a head's attended values, f[h k], or 0 if the last
      projection has no bias to absorb it; None: values cannot be cut.
  """

  attn: dict[str, Any]
  hidden: HiddenFactors | None
  qk_rank: jax.Array | np.ndarray | None
  value_mean: jax.Array | np.ndarray | None


def factorise(
  spec: ViTSpec, params: Mapping[str, Any], moments: Sequence[LayerMoments]
) -> tuple[LayerFactors, ...]:
  """Computes the factors of each layer.

  Args:
    spec: The dense model.
    params: Parameters of the dense model.
    moments: Moments of the dense model's layers on calibration images, see `calibrate`.
  """
  lists, found = sorted_lists(spec), []
  for i, layer in enumerate(moments):
    block = params[f"blocks_{i}"]
    hidden = None
    if HIDDEN in lists:
      assert layer.hidden is not None
      hidden = _hidden_factors(block["mlp"]["fc2"], layer.hidden)
    heads = _Heads(block["attn"], spec.num_heads, layer.tokens)
    value_mean = heads.rotate_values(layer.attended) if VALUE in lists else None
    qk_rank = None
    if QK in lists and spec.rotary is None:
      heads.rotate_queries_and_keys()
      qk_rank = np.tile(np.arange(lists[QK].length), (spec.num_heads, 1))
    elif QK in lists:
      model = build(spec, spec.dense_layers)
      positions = model.apply({"params": params}, i, method="layer_positions")
      qk_rank = heads.rank_of_pairs(np.asarray(positions.angles, np.float64), positions.halves)
    found.append(LayerFactors(heads.params(), hidden, qk_rank, value_mean))
  return tuple(found)


def _hidden_factors(fc2: Mapping[str, Any], moments: Moments) -> HiddenFactors:
  kernel = np.asarray(fc2["kernel"], np.float64)
  mean, covariance = moments.mean, moments.covariance
  if "bias" not in fc2:
    mean, covariance = np.zeros_like(mean), covariance + np.outer(mean, mean)
  covariance = _with_ridge(covariance, _HIDDEN_RIDGE)
  order = importance_order(covariance, kernel)
  factor = np.linalg.cholesky(covariance[np.ix_(order, order)])
  back = np.empty_like(factor)
  back[order] = np.triu(np.linalg.inv(factor).T)
  front = factor.T @ kernel[order]
  return HiddenFactors(order, *(a.astype(np.float32) for a in (back, front, mean)))


class _Heads:
  """The heads of one layer as linear maps of (x, 1), which are rotated in double precision.

  Shapes: h heads, c channels, k dimensions. `q`, `k` and `v` are f[h c+1 k]; the last row is the
  bias, or 0 if there is none. `out`, the projection, is f[h k c].
  """

  def __init__(self, attn: Mapping[str, Any], num_heads: int, moments: Moments):
    self.attn = attn
    kernel = np.asarray(attn["qkv"]["kernel"], np.float64)
    bias = np.zeros((3, kernel.shape[1] // 3))
    if "bias" in attn["qkv"]:
      bias = np.asarray(attn["qkv"]["bias"], np.float64).reshape(3, -1)
    if "q_bias" in attn:
      bias[0], bias[2] = attn["q_bias"], attn["v_bias"]
    maps = np.concatenate([kernel, bias.reshape(1, -1)])
    self.q, self.k, self.v = maps.reshape(len(maps), 3, num_heads, -1).transpose(1, 2, 0, 3)
    out = np.asarray(attn["proj"]["kernel"], np.float64)
    self.out = out.reshape(num_heads, -1, out.shape[1])
    self.mean = np.append(moments.mean, 1.0)
    self.covariance = np.pad(moments.covariance, (0, 1))
    self.second = self.covariance + np.outer(self.mean, self.mean)

  def rotate_queries_and_keys(self) -> None:
    """Rotates queries and keys so that the first dimensions give the best logits of their rank.

    With E[qqᵀ] = AAᵀ, the keys' covariance BBᵀ and the singular value decomposition AᵀB = USVᵀ, the
    rotated queries and keys are S^-½ VᵀBᵀ q and S^-½ UᵀAᵀ k. Keys enter by their covariance, as a
    shift of a query's logits by the mean key does not change the softmax. Existing biases are thus
    just rotated, and no new bias is needed.
    """
    a = _root(self.q, self.second)
    b = _root(self.k, self.covariance)
    u, s, vt = np.linalg.svd(a.swapaxes(1, 2) @ b)
    scale = 1 / np.sqrt(s)[:, None]
    self.q = self.q @ (b @ vt.swapaxes(1, 2) * scale)
    self.k = self.k @ (a @ u * scale)

  def rotate_values(self, attended: Moments) -> np.ndarray:
    """Rotates values so that the first dimensions give the best output of their rank.

    The directions are those in which a head's contribution to the output has the largest variance,
    or the largest mean square if the projection has no bias to absorb the mean. They are computed
    from the attended values, which vary less than the values that attention averages, and in other
    directions.

    Args:
      attended: Moments of the attended values of all heads.

    Returns:
      Mean of the attended values, f[h k], or 0, see `LayerFactors`.
    """
    heads, dims, _ = self.out.shape
    mean = attended.mean.reshape(heads, 1, dims)
    moments = np.einsum("hihj->hij", attended.covariance.reshape((heads, dims) * 2))
    if "bias" not in self.attn["proj"]:
      mean, moments = np.zeros_like(mean), moments + mean.swapaxes(1, 2) @ mean
    root = np.linalg.cholesky(_with_ridge(moments, _HEAD_RIDGE))
    _, _, vt = np.linalg.svd(root.swapaxes(1, 2) @ self.out, full_matrices=False)
    turn = self.out @ vt.swapaxes(1, 2)
    self.v, self.out = self.v @ turn, vt
    return (mean @ turn)[:, 0].astype(np.float32)

  def rank_of_pairs(self, angles: np.ndarray, halves: bool) -> np.ndarray:
    """Ranks pairs of dimensions by their energy in the logits.

    A pair, as complex numbers q and k, adds Re(q* k) to a logit, after each has been multiplied by
    exp(ia) for its angle a. The energy is the mean square of this term over tokens, with centred
    keys, under the assumption that content does not depend on position.

    Args:
      angles: Angles of all tokens, f[#h n k//2].
      halves: Pairing of dimensions, see `Rotary`.

    Returns:
      Rank of each dimension, i[h k]; the two of the pair at place p have ranks 2p and 2p + 1.
    """
    dims = np.arange(self.q.shape[2])
    first, second = np.split(dims, 2) if halves else (dims[0::2], dims[1::2])
    turn, double = (np.exp(1j * times * angles).mean(axis=1) for times in (1, 2))
    q_power, q_square = self._complex_moments(self.q[..., first] + 1j * self.q[..., second])
    k = self.k[..., first] + 1j * self.k[..., second]
    k_power, k_square = self._complex_moments(k)
    k_mean = (self.mean @ k) * turn
    k_power, k_square = k_power - np.abs(k_mean) ** 2, k_square * double - k_mean**2
    energy = q_power * k_power + (np.conj(q_square * double) * k_square).real
    places = np.argsort(np.argsort(-energy, axis=1, kind="stable"), axis=1)
    rank = np.empty((len(places), dims.size), np.int64)
    rank[:, first], rank[:, second] = 2 * places, 2 * places + 1
    return rank

  def params(self) -> dict[str, Any]:
    """Returns the parameters of the attention, with biases where it had some before."""
    maps = np.stack([self.q, self.k, self.v]).transpose(2, 0, 1, 3)  # [c+1 3 h k]
    kernel, bias = maps[:-1], maps[-1].reshape(3, -1)
    made = {"qkv": {"kernel": kernel.reshape(len(kernel), -1)}, "proj": dict(self.attn["proj"])}
    made["proj"]["kernel"] = self.out.reshape(-1, self.out.shape[2])
    if "bias" in self.attn["qkv"]:
      made["qkv"]["bias"] = bias.ravel()
    if "q_bias" in self.attn:
      made["q_bias"], made["v_bias"] = bias[0], bias[2]
    return jax.tree.map(lambda a: np.asarray(a, np.float32), {**self.attn, **made})

  def _complex_moments(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns E|z|² and E[z²] of complex maps of (x, 1), f[h p] each."""
    seen = self.second @ z
    return np.sum(np.conj(z) * seen, axis=1).real, np.sum(z * seen, axis=1)


def _root(maps: np.ndarray, moments: np.ndarray) -> np.ndarray:
  """Returns the Cholesky factors of the moments of each head's outputs, f[h k k].

  Args:
    maps: Maps of the heads, f[h c k].
    moments: Second moments of the inputs of the maps, f[c c].
  """
  found = _with_ridge(maps.swapaxes(1, 2) @ moments @ maps, _HEAD_RIDGE)
  return np.linalg.cholesky(found)


def _with_ridge(moments: np.ndarray, ridge: float) -> np.ndarray:
  """Adds a share of the mean variance, and a tiny constant, to each variance, f[* m m]."""
  size = moments.shape[-1]
  mean = np.trace(moments, axis1=-2, axis2=-1)[..., None, None] / size
  return moments + (ridge * mean + 1e-30) * np.eye(size)
