"""ViT-Slim's search: trains soft masks together with the weights under an L1 penalty.

One global threshold per kind of mask then cuts them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.config import ViTSlimOptions
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Metrics
from vitcomp_jax.methods.vit_slim.reducer import KeepPositions
from vitcomp_jax.models.gates import HardMask, SoftMask, both_of_pairs
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.slicing import LayerIndex, layer_index, scale_qkv
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output, TokenReducer

KINDS = ("attn", "mlp", "patch")
_GATES = {"attn": "head_gate", "mlp": "hidden_gate", "patch": "token_gate"}
_INITIAL_PATCH = 3.0  # tanh(3) = 0.995
# Range of the plotted factors; those outside are counted in the outer bins.
HISTOGRAM_LIMITS = (-1.0, 1.5)
_BINS = 50


@dataclasses.dataclass(frozen=True)
class Masks:
  """Masks of a cut. Shapes: l layers, h heads, k head dimensions, m hidden units, n tokens.

  Attributes:
    attn: bool[l h k], or [l h 1] for whole heads, [l 1 k] for the same dimensions in every head.
    mlp: bool[l m].
    patch: bool[l n], prefix included; a token dropped in one layer is dropped in all later ones.
  """

  attn: np.ndarray
  mlp: np.ndarray
  patch: np.ndarray


@dataclasses.dataclass(frozen=True)
class ViTSlim:
  """Learns soft masks on attention, hidden units and patches of a model, under an L1 penalty.

  Attributes:
    spec: The dense model.
    options: Options of the method, such as `config.slim`: the unit of an attention mask (`dims`, a
      dimension of a head; `heads`, a whole head; `uniform`, a dimension of all heads), and the
      weights of the L1 norms.

  References:
    Chavan et al., `ViT-Slim <https://arxiv.org/abs/2201.00814>`_, 2022.
  """

  spec: ViTSpec
  options: ViTSlimOptions = ViTSlimOptions()

  def __post_init__(self) -> None:
    _check_supported(self.spec, self.options)

  def attn_shape(self) -> tuple[int, int]:
    """Returns the numbers of heads and dimensions with separate masks.

    Dimensions that are rotated together share a mask.
    """
    heads, dims = self.spec.num_heads, self.spec.width // self.spec.num_heads
    if self.spec.rotary is not None:
      dims //= 2
    return {"dims": (heads, dims), "heads": (heads, 1), "uniform": (1, dims)}[self.options.attn]

  def layers(self) -> tuple[LayerSpec, ...]:
    """Returns layers with learnable gates, each of which is a module with its own masks."""
    heads, dims = self.attn_shape()
    return tuple(
      dataclasses.replace(
        layer,
        head_gate=SoftMask((1, 1, heads, 1, dims), pairing=layer.pairing if dims > 1 else None),
        hidden_gate=SoftMask((1, 1, self.spec.mlp_dim)),
        token_gate=SoftMask((1, self.spec.num_tokens, 1), _INITIAL_PATCH, squash=True),
      )
      for layer in self.spec.dense_layers
    )

  def searches(self, gate: str) -> bool:
    """Returns whether a gate's masks are trained, i.e. whether their weight is not 0."""
    options = self.options
    weights = {
      "head_gate": options.w_attn,
      "hidden_gate": options.w_mlp,
      "token_gate": options.w_patch,
    }
    return weights[gate] > 0

  def init(self) -> dict[str, Any]:
    """Returns the initial masks, all open."""
    heads, dims = self.attn_shape()
    return {
      f"blocks_{i}": {
        "head_gate": {"zeta": jnp.ones((1, 1, heads, 1, dims))},
        "hidden_gate": {"zeta": jnp.ones((1, 1, self.spec.mlp_dim))},
        "token_gate": {"zeta": jnp.full((1, self.spec.num_tokens, 1), _INITIAL_PATCH)},
      }
      for i in range(self.spec.depth)
    }

  def sparsity(self, arch: Mapping[str, Any]) -> dict[str, Array]:
    """Computes the L1 norm of each kind of mask over all layers."""

    def norm(kind: str) -> Array:
      return sum((jnp.sum(jnp.abs(v)) for v in _factors(arch, kind, jnp.tanh)), jnp.zeros(()))

    return {kind: norm(kind) for kind in KINDS}

  def penalty(self, arch: Mapping[str, Any], out: Output, step: Array) -> tuple[Array, Metrics]:
    """Computes the weighted L1 norms; metrics are each norm, and histograms of the masks."""
    del out, step
    norms = self.sparsity(arch)
    weighted = self.options.w_attn * norms["attn"] + self.options.w_mlp * norms["mlp"]
    total = weighted + self.options.w_patch * norms["patch"]
    metrics = {f"l1_{kind}": norm for kind, norm in norms.items()}
    for kind in KINDS:
      if self.searches(_GATES[kind]):
        metrics[f"{kind}_histogram"] = _histogram(_factors(arch, kind, jnp.tanh))
    return total, metrics

  def cut(
    self,
    arch: Mapping[str, Any],
    budgets: Sequence[float],
    min_units: int = 0,
    refuse_empty: bool = True,
  ) -> Masks:
    """Cuts by one global threshold per kind.

    Args:
      arch: Learnt masks.
      budgets: Shares of attention masks, hidden units and patches to keep, each in (0, 1].
      min_units: Minimum number of head dimensions, hidden units and patches to keep in each layer.
      refuse_empty: Whether an empty layer is an error; the authors allow it.

    Raises:
      UserError: If a layer would be empty; the message names it.
    """
    kept = {}
    for kind, budget in zip(KINDS, budgets, strict=True):
      values = np.stack([np.asarray(v) for v in _factors(arch, kind, np.tanh)])
      kept[kind] = _above(values.reshape(len(values), -1), budget, min_units)
    # From deep to shallow: earlier layers must pass on the patches that later ones use.
    kept["patch"] = np.logical_or.accumulate(kept["patch"][::-1])[::-1]
    kept["attn"] = kept["attn"].reshape(-1, *self.attn_shape())
    masks = Masks(**kept)
    if refuse_empty:
      _check_not_empty(masks, self.spec)
    return masks

  def smallest(self, min_units: int) -> Masks:
    """Returns the smallest possible cut: `min_units` (at least 1) of each searched kind."""

    def kept(gate: str, units: int, always: int = 0) -> np.ndarray:
      least = always + max(min_units, 1) if self.searches(gate) else units
      return np.tile(np.arange(units) < least, (self.spec.depth, 1))

    shape = self.attn_shape()
    return Masks(
      kept("head_gate", shape[0] * shape[1]).reshape(-1, *shape),
      kept("hidden_gate", self.spec.mlp_dim),
      kept("token_gate", self.spec.num_tokens, self.spec.num_prefix),
    )


def masked_layers(spec: ViTSpec, masks: Masks) -> tuple[LayerSpec, ...]:
  """Returns the dense layers with cut units masked, as in the authors' evaluation."""
  return tuple(
    dataclasses.replace(
      layer,
      head_gate=_hard(per_dim(attn, spec)[None, None, :, None]),
      hidden_gate=_hard(mlp[None, None]),
      token_gate=_hard(patch[None, :, None]),
    )
    for layer, attn, mlp, patch in zip(
      spec.dense_layers, masks.attn, masks.mlp, masks.patch, strict=True
    )
  )


def per_dim(values: np.ndarray, spec: ViTSpec) -> np.ndarray:
  """Expands masks that heads or dimensions share to one value for each of them, […, h, k]."""
  heads, dims = spec.num_heads, spec.width // spec.num_heads
  pairing = spec.dense_layers[0].pairing
  if pairing is not None and values.shape[-1] == dims // 2:
    values = np.asarray(both_of_pairs(values, pairing))
  return np.broadcast_to(values, (*values.shape[:-2], heads, dims))


def _check_supported(spec: ViTSpec, options: ViTSlimOptions) -> None:
  """Rejects masks on units that cannot be removed one by one because of a norm or a bias table."""
  refused = ""
  if options.w_attn > 0 and spec.attn_norm:
    refused = "attention is normed over all heads; set config.slim.w_attn=0"
  elif options.w_attn > 0 and spec.relative_bias == "shared":
    refused = "layers share a bias for each head; set config.slim.w_attn=0"
  elif options.w_attn > 0 and spec.qk_norm and options.attn != "heads":
    refused = "queries and keys are normed over a head; set config.slim.attn=heads"
  elif options.w_mlp > 0 and spec.mlp_norm:
    refused = "hidden units are normed; set config.slim.w_mlp=0"
  if refused:
    raise UserError(
      f"config.slim: expected units that can be cut one by one, got {spec.name}, whose {refused}."
    )


def _hard(mask: np.ndarray) -> HardMask:
  return HardMask(mask.shape, tuple(np.flatnonzero(mask).tolist()))


def deploy(
  spec: ViTSpec, masks: Masks, tile: int = 1
) -> tuple[tuple[LayerSpec, ...], tuple[LayerIndex, ...]]:
  """Returns the layers of the slimmed network, and the units of the dense one that they keep.

  Without patch masks, the slimmed network has the same outputs as the masked one. A masked patch
  still has a key and a value (the biases of `qkv`) and a share of the softmax; the slimmed network
  removes it, so it costs nothing. CLS and the rest of the prefix always stay.

  Args:
    spec: The dense model.
    masks: Units to keep.
    tile: Multiple to which head dimensions and hidden units are padded with zeros.
  """
  attn = per_dim(masks.attn, spec)
  patch = masks.patch | (np.arange(spec.num_tokens) < spec.num_prefix)
  pairing = spec.dense_layers[0].pairing
  indices = tuple(layer_index(a, m, tile, pairing) for a, m in zip(attn, masks.mlp, strict=True))
  layers = []
  for layer, index, kept in zip(spec.dense_layers, indices, patch, strict=True):
    changes: dict[str, Any] = {"select": _selecting(kept), **layer.sliced(index)}
    layers.append(dataclasses.replace(layer, **changes))
  return tuple(layers), indices


def _selecting(kept: np.ndarray) -> TokenReducer:
  return keep_all if kept.all() else KeepPositions(tuple(np.flatnonzero(kept).tolist()))


def fold(spec: ViTSpec, params: Mapping[str, Any], arch: Mapping[str, Any]) -> dict[str, Any]:
  """Multiplies the learnt factors of attention and hidden units into the weights.

  A cut sets every kept factor to 1, although the weights were trained with the learnt factor;
  folding preserves it. The factors of patches cannot be folded into weights; they become 1, as in
  the paper.

  Args:
    spec: The dense model.
    params: Weights after the search.
    arch: Masks after the search.
  """
  folded = dict(params)
  for name, gates in arch.items():
    attn = per_dim(np.asarray(gates["head_gate"]["zeta"])[0, 0, :, 0], spec).ravel()
    hidden = np.asarray(gates["hidden_gate"]["zeta"]).ravel()
    block = scale_qkv(params[name], np.tile(attn, 3))
    fc2 = block["mlp"]["fc2"]
    fc2 = {**fc2, "kernel": np.asarray(fc2["kernel"]) * hidden[:, None]}
    folded[name] = {**block, "mlp": {**block["mlp"], "fc2": fc2}}
  return folded


def thresholds(arch: Mapping[str, Any], budgets: Sequence[float]) -> list[float]:
  """Computes the authors' threshold of each kind: the value at index int((1 - budget) n)."""
  found = []
  for kind, budget in zip(KINDS, budgets, strict=True):
    values = np.concatenate([np.ravel(v) for v in _factors(arch, kind, np.tanh)])
    found.append(float(_threshold(values, budget)))
  return found


def _factors(arch: Mapping[str, Any], kind: str, tanh: Any) -> list[Any]:
  """Returns each layer's signed factors; for patches, these are tanh of the masks."""
  names = sorted(arch, key=lambda name: int(name.removeprefix("blocks_")))
  values = [arch[name][_GATES[kind]]["zeta"] for name in names]
  return [tanh(v) for v in values] if kind == "patch" else values


def _histogram(factors: Sequence[Array]) -> Array:
  """Counts the factors of all layers in bins of equal width, i[bins]."""
  low, high = HISTOGRAM_LIMITS
  values = jnp.concatenate([jnp.ravel(v) for v in factors])
  place = jnp.floor((values - low) * (_BINS / (high - low))).astype(jnp.int32)
  return jnp.bincount(jnp.clip(place, 0, _BINS - 1), length=_BINS)


def _threshold(values: np.ndarray, budget: float) -> Any:
  return np.sort(values, axis=None)[int((1.0 - budget) * values.size)]


def _above(values: np.ndarray, budget: float, min_units: int) -> np.ndarray:
  """Returns bool[l u]: at or above the global threshold, or among a layer's best `min_units`."""
  rank = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1)
  return (values >= _threshold(values, budget)) | (rank < min_units)


def _check_not_empty(masks: Masks, spec: ViTSpec) -> None:
  patches = masks.patch[:, spec.num_prefix :]
  for kind, kept in (("head", masks.attn), ("hidden unit", masks.mlp), ("patch", patches)):
    empty = np.flatnonzero(~kept.reshape(len(kept), -1).any(axis=1))
    if empty.size:
      raise UserError(
        f"config.slim.budgets: expected a {kind} in every layer, got none in layer {empty[0]}; "
        "raise that budget, or set config.slim.min_units to keep some."
      )
