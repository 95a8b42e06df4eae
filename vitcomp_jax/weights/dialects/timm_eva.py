"""Converts names of timm's classes Eva and Beit, which differ from its VisionTransformer's."""

import re
from collections.abc import Collection

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.described import Configs, Described
from vitcomp_jax.weights.dialects.renaming import Array, fuse, has, renamed, thirds
from vitcomp_jax.weights.tensors import State

_PARTS = ("q", "k", "v")
_OWN = r"blocks\.\d+\.(gamma_[12]|attn\.([qv]_bias|[qkv]_proj\.(weight|bias)))"


def recognises(names: Collection[str]) -> bool:
  """Returns whether layers are named as in timm's Eva or Beit (or in DeiT-III's files)."""
  return has(names, _OWN)


def describe(configs: Configs, tensors: State) -> Described | None:
  """Returns None, because the names of layers say no more than the tensors."""
  del configs, tensors
  return None


def to_timm(tensors: State, configs: Configs | None = None) -> dict[str, Array]:
  """Renames layer scales, and joins separate queries, keys and values.

  Args:
    tensors: Tensors by the names of Eva or Beit.
    configs: JSON files beside the weights, by name; not used.

  Returns:
    Tensors by the names of timm's VisionTransformer; if keys have no bias, `attn.q_bias` and
    `attn.v_bias` stay separate.

  Raises:
    UserError: If several queries share one key.
  """
  del configs
  state = renamed(tensors, [(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma")])
  for query in [name for name in state if name.endswith(".attn.q_proj.weight")]:
    attn = query.removesuffix("q_proj.weight")
    weights = [f"{attn}{part}_proj.weight" for part in _PARTS]
    biases = [f"{attn}{part}_proj.bias" for part in _PARTS]
    if not all(name in state for name in weights):
      continue  # the check of the names reports what is missing
    shapes = [tuple(state[name].shape) for name in weights]
    if len(set(shapes)) > 1:
      raise UserError(
        f"weights: expected as many keys and values as queries, got {weights} of the shapes "
        f"{shapes}; attention in which queries share keys is not supported."
      )
    fuse(state, weights, f"{attn}qkv.weight")
    if all(name in state for name in biases):
      fuse(state, biases, f"{attn}qkv.bias")
    for part in ("q", "v"):
      if f"{attn}{part}_proj.bias" in state:
        state[f"{attn}{part}_bias"] = state.pop(f"{attn}{part}_proj.bias")
  return state


def to_timm_eva(state: State, fused: bool) -> dict[str, Array]:
  """Renames tensors to the names of timm's Eva; the inverse of `to_timm`.

  Args:
    state: Tensors by the names of timm's VisionTransformer.
    fused: Whether the model has a single projection to queries, keys and values (`qkv_fused`).
  """
  state = renamed(state, [(r"^(blocks\.\d+)\.ls([12])\.gamma$", r"\1.gamma_\2")])
  if fused:
    return state
  for name in list(state):
    if match := re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", name):
      for part, tensor in zip(_PARTS, thirds(state.pop(name)), strict=True):
        state[f"{match[1]}{part}_proj.{match[2]}"] = tensor
    elif match := re.fullmatch(r"(.*\.attn\.)([qv])_bias", name):
      state[f"{match[1]}{match[2]}_proj.bias"] = state.pop(name)
  return state


def in_class(state: State, naming: str) -> dict[str, Array]:
  """Renames tensors to the names of one of timm's classes.

  Args:
    state: Tensors by the names of timm's VisionTransformer.
    naming: `vit` to keep these names, `eva` or `beit`, or `eva_split` for an Eva with separate
      projections to queries, keys and values.
  """
  return dict(state) if naming == "vit" else to_timm_eva(state, fused=naming != "eva_split")
