"""Builds and reads trees of all layers' variables."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from vitcomp_jax.models.spec import ViTSpec


def to_tree(spec: ViTSpec, of_layers: Sequence[Any]) -> dict[str, Any]:
  """Builds a tree of variables from one value per layer."""
  return traverse_util.unflatten_dict({spec.layer_path(i): v for i, v in enumerate(of_layers)})


def of_layer(spec: ViTSpec, tree: Mapping[str, Any], layer: int) -> Any:
  """Returns one layer's branch of a tree of variables."""
  return functools.reduce(lambda branch, key: branch[key], spec.layer_path(layer), tree)
