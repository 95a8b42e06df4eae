"""ViT-Slim's search: soft masks that are trained together with the weights under an L1 penalty.

One global threshold per kind then cuts them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vitcomp_jax.config import ViTSlimOptions
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Metrics
from vitcomp_jax.methods.vit_slim.reducer import KeepPositions
from vitcomp_jax.models.gates import HardMask, SoftMask
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.slicing import LayerIndex, layer_index, scale_qkv
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import Output, TokenReducer
from vitcomp_jax.models.vit import ViT

KINDS = ("attn", "mlp", "patch")
_GATES = {"attn": "head_gate", "mlp": "hidden_gate", "patch": "token_gate"}
_INITIAL_PATCH = 3.0  # tanh(3) = 0.995
# Between these lie the factors that plots show; others count at the ends.
HISTOGRAM_LIMITS = (-1.0, 1.5)
_BINS = 50


@dataclasses.dataclass(frozen=True)
class Masks:
  """Masks of a cut. Shapes: l layers, h heads, k head dimensions, m hidden units, n tokens.

  Attributes:
    attn: bool[l h k], or [l h 1] for whole heads, [l 1 k] for the same dimensions in every head.
    mlp: bool[l m].
    patch: bool[l n], prefix included; a later layer never has a token that an earlier one dropped.
  """

  attn: np.ndarray
  mlp: np.ndarray
  patch: np.ndarray


@dataclasses.dataclass(frozen=True)
class ViTSlim:
  """Learns soft masks on attention, hidden units and patches of a model, under an L1 penalty.

  Attributes:
    spec: The dense model.
    options: Of the method, `config.slim` for one: what an attention mask stands for (`dims`, a
      dimension of a head; `heads`, a whole head; `uniform`, a dimension in every head), and the
      weights of the L1 norms.

  References:
    Chavan et al., `ViT-Slim <https://arxiv.org/abs/2201.00814>`_, 2022.
  """

  spec: ViTSpec
  options: ViTSlimOptions = ViTSlimOptions()

  def attn_shape(self) -> tuple[int, int]:
    """Heads and dimensions that have masks of their own."""
    heads, dims = self.spec.num_heads, self.spec.width // self.spec.num_heads
    return {"dims": (heads, dims), "heads": (heads, 1), "uniform": (1, dims)}[self.options.attn]

  def layers(self) -> tuple[LayerSpec, ...]:
    """Layers whose gates learn; one module per layer and gate, as each has masks of its own."""
    heads, dims = self.attn_shape()
    return tuple(
      dataclasses.replace(
        layer,
        head_gate=SoftMask((1, 1, heads, 1, dims)),
        hidden_gate=SoftMask((1, 1, self.spec.mlp_dim)),
        token_gate=SoftMask((1, self.spec.num_tokens, 1), _INITIAL_PATCH, squash=True),
      )
      for layer in self.spec.dense_layers
    )

  def searches(self, gate: str) -> bool:
    """Whether a gate's masks are trained: their weight is not 0."""
    options = self.options
    weights = {
      "head_gate": options.w_attn,
      "hidden_gate": options.w_mlp,
      "token_gate": options.w_patch,
    }
    return weights[gate] > 0

  def init(self) -> dict[str, Any]:
    """The masks before the first step: all open."""
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
    """The L1 norm of each kind of mask, over all layers."""

    def norm(kind: str) -> Array:
      return sum((jnp.sum(jnp.abs(v)) for v in _factors(arch, kind, jnp.tanh)), jnp.zeros(()))

    return {kind: norm(kind) for kind in KINDS}

  def penalty(self, arch: Mapping[str, Any], out: Output, step: Array) -> tuple[Array, Metrics]:
    """Computes the weighted L1 norms; as metrics each, and histograms of the masks."""
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
      arch: The learnt masks.
      budgets: Shares of attention masks, hidden units and patches to keep, each in (0, 1].
      min_units: Head dimensions, hidden units and patches that each layer keeps at least.
      refuse_empty: Whether a layer without any is an error; the authors go on.

    Raises:
      UserError: If a layer were left without any, naming the layer.
    """
    kept = {}
    for kind, budget in zip(KINDS, budgets, strict=True):
      values = np.stack([np.asarray(v) for v in _factors(arch, kind, np.tanh)])
      kept[kind] = _above(values.reshape(len(values), -1), budget, min_units)
    # From deep to shallow: what a later layer uses, the earlier ones pass on.
    kept["patch"] = np.logical_or.accumulate(kept["patch"][::-1])[::-1]
    kept["attn"] = kept["attn"].reshape(-1, *self.attn_shape())
    masks = Masks(**kept)
    if refuse_empty:
      _check_not_empty(masks, self.spec)
    return masks

  def smallest(self, min_units: int) -> Masks:
    """The least that a cut can leave: of what is searched, `min_units` or one in every layer."""

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
  """Layers of the dense network in which what was cut is masked: the authors' evaluation."""
  return tuple(
    dataclasses.replace(
      layer,
      head_gate=_hard(attn[None, None, :, None]),
      hidden_gate=_hard(mlp[None, None]),
      token_gate=_hard(patch[None, :, None]),
    )
    for layer, attn, mlp, patch in zip(
      spec.dense_layers, masks.attn, masks.mlp, masks.patch, strict=True
    )
  )


def _hard(mask: np.ndarray) -> HardMask:
  return HardMask(mask.shape, tuple(np.flatnonzero(mask).tolist()))


def deploy(
  spec: ViTSpec, masks: Masks, tile: int = 1
) -> tuple[tuple[LayerSpec, ...], tuple[LayerIndex, ...]]:
  """The layers of the slimmed network, and which units of the dense one they keep.

  Without patch masks it computes what the masked network does. A masked patch, though, still is a
  key and a value made of the biases of `qkv`, and takes its share of the softmax; here it is
  removed, and only then does it cost nothing. CLS and the rest of the prefix always stay.

  Args:
    spec: The dense model.
    masks: What to keep.
    tile: Head dimensions and hidden units are filled up with zeros to a multiple of it.
  """
  heads, dims = spec.num_heads, spec.width // spec.num_heads
  attn = np.broadcast_to(masks.attn, (spec.depth, heads, dims))
  patch = masks.patch | (np.arange(spec.num_tokens) < spec.num_prefix)
  indices = tuple(layer_index(a, m, tile) for a, m in zip(attn, masks.mlp, strict=True))
  layers = []
  for layer, index, kept in zip(spec.dense_layers, indices, patch, strict=True):
    changes: dict[str, Any] = {"select": _selecting(kept), **index.widths}
    layers.append(dataclasses.replace(layer, **changes))
  return tuple(layers), indices


def _selecting(kept: np.ndarray) -> TokenReducer:
  return keep_all if kept.all() else KeepPositions(tuple(np.flatnonzero(kept).tolist()))


def fold(spec: ViTSpec, params: Mapping[str, Any], arch: Mapping[str, Any]) -> dict[str, Any]:
  """The weights with the factors of attention and hidden units multiplied into them.

  A cut makes every factor that is kept 1, though the weights were trained with the factor as it is;
  this keeps it. The patches' factors have no weights to go into, and become 1 as in the paper.

  Args:
    spec: The dense model.
    params: Its weights after the search.
    arch: The masks after the search.
  """
  folded = dict(params)
  heads = spec.num_heads, spec.width // spec.num_heads
  for name, gates in arch.items():
    attn = np.broadcast_to(np.asarray(gates["head_gate"]["zeta"])[0, 0, :, 0], heads).ravel()
    hidden = np.asarray(gates["hidden_gate"]["zeta"]).ravel()
    block = scale_qkv(params[name], np.tile(attn, 3))
    fc2 = block["mlp"]["fc2"]
    fc2 = {**fc2, "kernel": np.asarray(fc2["kernel"]) * hidden[:, None]}
    folded[name] = {**block, "mlp": {**block["mlp"], "fc2": fc2}}
  return folded


_AUTHORS_NAMES = {
  "head_gate": ("attn", "zeta"),
  "hidden_gate": ("mlp", "zeta"),
  "token_gate": ("attn", "patch_zeta"),
}


def to_authors(arch: Mapping[str, Any]) -> dict[str, Any]:
  """The masks as a parameter tree under the authors' names, such as `blocks.0.attn.patch_zeta`."""
  tree: dict[str, Any] = {}
  for block, gates in arch.items():
    for gate, (module, name) in _AUTHORS_NAMES.items():
      tree.setdefault(block, {}).setdefault(module, {})[name] = gates[gate]["zeta"]
  return tree


def from_authors(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The masks among tensors under the authors' names; those that are missing are left out."""
  arch: dict[str, Any] = {}
  for name, values in state.items():
    for gate, (module, leaf) in _AUTHORS_NAMES.items():
      if name.endswith(f".{module}.{leaf}"):
        block = name.removesuffix(f".{module}.{leaf}").replace(".", "_")
        arch.setdefault(block, {})[gate] = {"zeta": values}
  return arch


def thresholds(arch: Mapping[str, Any], budgets: Sequence[float]) -> list[float]:
  """The authors' thresholds of the three kinds: the value at index int((1 - budget) n)."""
  found = []
  for kind, budget in zip(KINDS, budgets, strict=True):
    values = np.concatenate([np.ravel(v) for v in _factors(arch, kind, np.tanh)])
    found.append(float(_threshold(values, budget)))
  return found


def _factors(arch: Mapping[str, Any], kind: str, tanh: Any) -> list[Any]:
  """Each layer's factors: signed, not absolute; a patch's through tanh."""
  names = sorted(arch, key=lambda name: int(name.removeprefix("blocks_")))
  values = [arch[name][_GATES[kind]]["zeta"] for name in names]
  return [tanh(v) for v in values] if kind == "patch" else values


def _histogram(factors: Sequence[Array]) -> Array:
  """Counts of the factors of all layers in equal bins, i[bins]."""
  low, high = HISTOGRAM_LIMITS
  values = jnp.concatenate([jnp.ravel(v) for v in factors])
  place = jnp.floor((values - low) * (_BINS / (high - low))).astype(jnp.int32)
  return jnp.bincount(jnp.clip(place, 0, _BINS - 1), length=_BINS)


def _threshold(values: np.ndarray, budget: float) -> Any:
  return np.sort(values, axis=None)[int((1.0 - budget) * values.size)]


def _above(values: np.ndarray, budget: float, min_units: int) -> np.ndarray:
  """bool[l u]: at or above the threshold over all layers, or among a layer's best."""
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


def authors_cost(spec: ViTSpec, masks: Masks) -> tuple[int, int]:
  """Parameters and MACs of a cut by the authors' own formulas, to compare with the paper's table.

  Their MACs count biases and the softmax, use the patches (without CLS) that the layer before
  keeps, and count vanished heads in the softmax; `macs.static_macs` counts what is computed.
  """
  c, heads, dims = spec.width, spec.num_heads, spec.width // spec.num_heads
  shape = (spec.depth, heads, dims)
  attn = np.broadcast_to(masks.attn, shape).reshape(spec.depth, -1).sum(axis=1).tolist()
  mlp = masks.mlp.sum(axis=1).tolist()
  tokens = [spec.num_patches, *masks.patch.sum(axis=1).tolist()[:-1]]
  params = _dense_params(spec)
  total = spec.num_patches * c * 3 * spec.patch_size**2 + c * spec.num_classes
  for a, m, n in zip(attn, mlp, tokens, strict=True):
    params += _authors_layer_params(c, a, m) - _authors_layer_params(c, c, spec.mlp_dim)
    total += 2 * c * n + n * (2 * c * m + c + m)
    total += 3 * c * n * a + 3 * n * a + 2 * n * n * a + 6 * heads * n * n + n * a * c + n * c
  return params, total


def _authors_layer_params(width: int, attn: int, mlp: int) -> int:
  return (4 * width + 3) * attn + width + 2 * width * mlp + width + mlp


def _dense_params(spec: ViTSpec) -> int:
  model = ViT(spec, spec.dense_layers)
  images = jax.ShapeDtypeStruct((1, *spec.image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
