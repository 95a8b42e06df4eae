"""Converts the tensor names of other libraries and of models' authors to timm's names."""

import logging
from collections.abc import Collection

from vitcomp_jax.weights.dialects import authors, huggingface, open_clip, timm_eva
from vitcomp_jax.weights.dialects.described import Configs, Described, described
from vitcomp_jax.weights.dialects.renaming import as_head
from vitcomp_jax.weights.tensors import State

# The first dialect that recognises a checkpoint's names reads it.
DIALECTS = (huggingface, open_clip, authors, timm_eva)


def recognises(names: Collection[str]) -> bool:
  """Returns whether tensors have the names of a known library or of a model's authors."""
  return any(dialect.recognises(names) for dialect in DIALECTS)


def translate(tensors: State, configs: Configs) -> tuple[State, Described]:
  """Renames tensors to timm's names, and reads the model's description from names and configs.

  Args:
    tensors: Tensors by their names in a file.
    configs: JSON files beside the weights, by name.

  Returns:
    The tensors by timm's names, with unknown names unchanged; and what is known about the model.
  """
  for dialect in DIALECTS:
    if dialect.recognises(tensors.keys()):
      said = dialect.describe(configs, tensors) or Described({})
      return dialect.to_timm(tensors, configs), said
  if {"norm_pre.weight", "head.weight"} <= tensors.keys() and "head.bias" not in tensors:
    logging.info("weights: their head has no bias, as CLIP's projection: it is one of zeros")
    projected = {**tensors, **as_head(tensors["head.weight"])}
    return projected, described(("names", {"projection": True}))
  return tensors, Described({})
