"""timm's parameter names and layouts, converted to the Flax parameter tree and back.

| timm                                       | Flax                                    |
|--------------------------------------------|-----------------------------------------|
| `blocks.0.…`                               | `blocks_0/…`                            |
| Linear `weight [out, in]`                  | `kernel [in, out]`                      |
| Conv2d `weight [out, in, kh, kw]`          | `kernel [kh, kw, in, out]`              |
| LayerNorm `weight [d]`                     | `scale [d]`                             |
| `bias`, `gamma`, tokens, positions         | the same                                |

The rank distinguishes linear layers, convolutions and norms. Query, key and value remain one fused
kernel with timm's order of rows (q, k, v; each head by head).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.weights.tensors import State

Params = dict[str, Any]
Shape = tuple[int, ...]

_TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TIMM = {2: (1, 0), 4: (3, 2, 0, 1)}
# timm modules whose parameter is called `scale`, not `weight`.
_SCALES = ("res_scale", "layer_scale", "act")


def to_flax(state: State, put: Callable[[np.ndarray, str], Any] | None = None) -> Params:
  """Converts timm's tensors to the Flax parameter tree, only by renaming and transposing.

  Args:
    state: Arrays by timm's names, in PyTorch's layout.
    put: Function of each array and its name that returns the leaf of the tree, such as an array on
      a device, which avoids two copies of all arrays in memory; None: the array.

  Returns:
    Nested dicts of the same arrays in Flax's layout. `to_timm` is the exact inverse.
  """
  params: Params = {}
  for name, tensor in state.items():
    *modules, leaf = name.split(".")
    array = np.asarray(tensor)
    if leaf == "weight":
      leaf = {1: "scale", 2: "kernel", 4: "kernel"}.get(array.ndim, leaf)
      array = array.transpose(_TO_FLAX.get(array.ndim))
    branch = params
    for module in _join_indices(modules):
      branch = branch.setdefault(module, {})
    array = np.asarray(array, order="C")
    branch[leaf] = array if put is None else put(array, name)
  return params


def to_timm(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Converts a Flax parameter tree to timm's tensors, only by renaming and transposing.

  Args:
    params: Nested dicts of arrays.

  Returns:
    Contiguous arrays by timm's names, in PyTorch's layout.
  """
  state = {}
  for path, leaf in _leaves(params):
    array = np.asarray(leaf)
    if path[-1] == "kernel":
      array = array.transpose(_TO_TIMM.get(array.ndim))
    state[timm_name(path)] = np.asarray(array, order="C")
  return state


def timm_name(path: Sequence[str]) -> str:
  """Returns the name that timm gives a parameter.

  Args:
    path: Keys from the root of the Flax tree to the parameter.

  Returns:
    The name, such as `blocks.0.attn.qkv.weight` for `blocks_0, attn, qkv, kernel`.
  """
  *modules, leaf = path
  owner = modules[-1] if modules else ""
  if leaf == "kernel" or (leaf == "scale" and not owner.startswith(_SCALES)):
    leaf = "weight"
  # `blocks_0` is item 0 of `blocks`; leaves keep their names.
  names = [re.sub(r"_(?=\d+(_\d+)*$)", ".", module) for module in modules]
  return ".".join([*names, leaf])


def timm_shapes(params: Mapping[str, Any]) -> dict[str, Shape]:
  """Returns the shapes of parameters in PyTorch's layout, by timm's names.

  Args:
    params: Nested dicts of anything with a `shape`, such as `jax.ShapeDtypeStruct`.
  """
  shapes = {}
  for path, leaf in _leaves(params):
    shape = tuple(leaf.shape)
    axes = _TO_TIMM.get(len(shape)) if path[-1] == "kernel" else None
    shapes[timm_name(path)] = tuple(shape[i] for i in axes) if axes else shape
  return shapes


def module(name: str) -> str:
  """Returns the outermost module of a parameter."""
  return name.split(".", 1)[0]


def owner(name: str) -> str:
  """Returns the innermost module of a parameter."""
  return name.rpartition(".")[0]


def _join_indices(modules: Sequence[str]) -> list[str]:
  """Joins indices to module names: `blocks, 0, attn` becomes `blocks_0, attn`."""
  joined: list[str] = []
  for module in modules:
    if module.isdigit() and joined:
      joined[-1] += f"_{module}"
    else:
      joined.append(module)
  return joined


def _leaves(
  tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields every leaf with its path, in the order of the dicts."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, key))
    else:
      yield (*path, key), value
