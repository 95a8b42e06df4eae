"""Conventions of ViT-Slim's authors: the names of their masks, and the cost of a cut."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vitcomp_jax.methods.vit_slim.search import Masks, per_dim
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.weights.loading import abstract_params

_AUTHORS_NAMES = {
  "head_gate": ("attn", "zeta"),
  "hidden_gate": ("mlp", "zeta"),
  "token_gate": ("attn", "patch_zeta"),
}


def to_authors(arch: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the masks as a tree with the authors' names, such as `blocks.0.attn.patch_zeta`."""
  tree: dict[str, Any] = {}
  for block, gates in arch.items():
    for gate, (module, name) in _AUTHORS_NAMES.items():
      tree.setdefault(block, {}).setdefault(module, {})[name] = gates[gate]["zeta"]
  return tree


def from_authors(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the masks found among tensors with the authors' names."""
  arch: dict[str, Any] = {}
  for name, values in state.items():
    for gate, (module, leaf) in _AUTHORS_NAMES.items():
      if name.endswith(f".{module}.{leaf}"):
        block = name.removesuffix(f".{module}.{leaf}").replace(".", "_")
        arch.setdefault(block, {})[gate] = {"zeta": values}
  return arch


def authors_cost(spec: ViTSpec, masks: Masks) -> tuple[int, int]:
  """Computes parameters and MACs of a cut by the authors' formulas, to compare with the paper.

  Their MACs include biases and the softmax, use the patches (without CLS) that the previous layer
  keeps, and count removed heads in the softmax; `macs.static_macs` counts the actual computation.
  """
  c, heads = spec.width, spec.num_heads
  attn = per_dim(masks.attn, spec).reshape(spec.depth, -1).sum(axis=1).tolist()
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
  shapes = abstract_params(ViT(spec, spec.dense_layers))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
