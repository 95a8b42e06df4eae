"""Checkpoints of Hugging Face transformers: their parameters under timm's names, and their specs.

Image encoders and their classifiers are read. Decoders of masked autoencoders, text towers, poolers
from pre-training and mask tokens are left out, and logged.
"""

import dataclasses
import fnmatch
import logging
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.described import Described, described
from vitcomp_jax.weights.dialects.huggingface_configs import (
  class_names,
  family_of,
  fields_of,
  has,
  is_classifier,
)
from vitcomp_jax.weights.dialects.huggingface_images import find_preparation, image_fields
from vitcomp_jax.weights.dialects.huggingface_names import (
  encoder_prefixes,
  head_name,
  timm_name,
)
from vitcomp_jax.weights.dialects.renaming import Array, changed, fuse, reshaped, rows
from vitcomp_jax.weights.dialects.shapes import fields_from_shapes
from vitcomp_jax.weights.tensors import Computed, State

Configs = Mapping[str, Mapping[str, Any]]

# Parameters of an encoder that do not affect its output.
_UNNEEDED = (
  "*.relative_position_index",
  "embeddings.mask_token",
  "embeddings.position_ids",
  "pooler.dense.*",
  "rope_embeddings.*",
)
# Such parameters beside an encoder.
_UNNEEDED_BESIDE = (
  "decoder.*",
  "lm_head.*",
  "logit_bias",
  "logit_scale",
  "text_model.*",
  "text_projection.*",
)


def recognises(names: Collection[str]) -> bool:
  """Returns whether names are those of a Vision Transformer in transformers."""
  return bool(encoder_prefixes(names))


def to_timm(tensors: State, configs: Configs | None = None) -> dict[str, Array]:
  """Renames a checkpoint's tensors to timm's names, and fuses queries, keys and values.

  No tensor is read. Unknown names are kept as they are; tensors that are left out are logged.

  Args:
    tensors: Tensors by transformers' names, of any version.
    configs: Not used, as the names suffice.

  Raises:
    UserError: If there is not exactly one image encoder, or there are two tensors for one
      parameter.
  """
  del configs
  state, left_out = _converted(tensors)
  if left_out:
    kinds = dict.fromkeys(re.sub(r"\.\d+\..*", ".*", name) for name in left_out)
    logging.info("weights: left out what the model does not use: %s", ", ".join(kinds))
  return state


def describe(configs: Configs, tensors: State) -> Described | None:
  """Describes a checkpoint's model by its configuration and tensors.

  The output of the model is: for a classifier, its logits; for CLIP with a projection, the
  embedding; for SigLIP, the output of its pooling head; for BEiT, that of its pooler; for I-JEPA,
  which has no CLS token, the mean of its tokens; for all others, the CLS token.

  Args:
    configs: JSON files beside the weights, by name.
    tensors: Tensors by transformers' names.

  Returns:
    The description; without a configuration, only what the tensors determine. None if the names are
    not transformers', or the configuration is another library's.

  Raises:
    UserError: If the configuration sets something that this library's model lacks, or does not fit
      the tensors.
  """
  config = configs.get("config.json", {})
  if not recognises(tensors) or (config and "model_type" not in config):
    return None
  found: dict[str, Any] = fields_from_shapes(_converted(tensors)[0])
  if not found:
    return Described({})  # parts are missing, which the check of the names reports
  projects = {"projection": True} if has(tensors, "visual_projection.weight") else {}
  if not config:
    # DeiT reads only CLS, unless a second classifier reads the distillation token.
    is_deit = found["distilled"] and not has(tensors, "distillation_classifier.weight")
    names = projects | ({"pool": "cls"} if is_deit else {})
    return described(("names", names), ("tensors", found))
  try:
    said = fields_of(config, found, tensors)
    images: tuple[str, Mapping[str, object]] = ("", {})
    if (preparation := find_preparation(configs)) is not None:
      family, _ = family_of(config)
      images = preparation[0], image_fields(*preparation, family, said["image_size"])
    classes: tuple[str, ...] = ()
    if is_classifier(config, tensors) and found["num_classes"]:
      classes = class_names(config, found["num_classes"])
  except (TypeError, ValueError, KeyError) as error:
    raise UserError(
      f"weights: expected configurations as transformers writes them, got others "
      f"({type(error).__name__}: {error}); save the model again."
    ) from error
  result = described(images, ("config.json", said), ("names", projects), ("tensors", found))
  return dataclasses.replace(result, class_names=classes)


def _converted(tensors: State) -> tuple[dict[str, Array], list[str]]:
  """Returns the tensors by timm's names, and the names of tensors that are left out."""
  state, left_out = _renamed(tensors)
  _reshape(state)
  _split_pooling(state)
  for layer in {match[0] for name in state if (match := re.match(r"blocks\.\d+\.", name))}:
    _fuse(state, f"{layer}attn.")
    _fill_biases(state, layer)
  return state, left_out


def _renamed(tensors: State) -> tuple[dict[str, Array], list[str]]:
  """Renames tensors; also returns the names of tensors that are left out."""
  prefixes = encoder_prefixes(tensors)
  if len(prefixes) != 1:
    raise UserError(
      f"weights: expected one encoder of images, got {len(prefixes)} ({', '.join(prefixes)}); "
      "keep the tensors of one."
    )
  encoder = prefixes[0]
  beside = re.sub(r"[^.]+\.$", "", encoder)
  is_gated = any(name.endswith("mlp.gate_proj.weight") for name in tensors)
  is_clip = f"{encoder}pre_layrnorm.weight" in tensors
  unneeded: tuple[str, ...] = _UNNEEDED
  if has(tensors, "classifier.weight"):
    # CLIP's and SigLIP's classifiers take the mean of the tokens.
    unneeded += ("head.*", "post_layernorm.*") if is_clip else ("head.*",)
  state: dict[str, Array] = {}
  left_out = []
  for name, tensor in tensors.items():
    if name.startswith(encoder):
      short = name.removeprefix(encoder)
      ours, others = timm_name(short, is_gated), unneeded
    else:
      short = name.removeprefix(beside)
      ours, others = head_name(short), _UNNEEDED_BESIDE
    if is_clip and ours in ("norm.weight", "norm.bias"):
      ours = f"fc_{ours}"  # CLIP applies the norm only to the CLS token
    if any(fnmatch.fnmatchcase(short, pattern) for pattern in others):
      left_out.append(name)
    elif ours in state:
      raise UserError(
        f"weights: expected one tensor for {ours}, got another, {name}; remove one of them."
      )
    else:
      state[ours or name] = tensor
  return state, left_out


def _reshape(state: dict[str, Array]) -> None:
  """Gives the tensors before and after the layers timm's shapes."""
  kernel = state["patch_embed.proj.weight"]
  width = kernel.shape[0]
  if kernel.ndim == 2:  # SigLIP 2 flattens patches with the channels last
    side = math.isqrt(kernel.shape[1] // 3)
    if kernel.shape[1] != 3 * side * side:
      raise UserError(
        f"weights: expected patches of three channels, got {kernel.shape[1]} values for each."
      )
    state["patch_embed.proj.weight"] = changed(
      kernel,
      lambda array: array.reshape(width, side, side, 3).transpose(0, 3, 1, 2),
      (width, 3, side, side),
    )
  if "cls_token" in state:  # CLIP's is a vector
    state["cls_token"] = reshaped(state["cls_token"], 1, 1, width)
  if "pos_embed" in state:  # CLIP's is a table
    positions = state["pos_embed"]
    state["pos_embed"] = reshaped(positions, 1, positions.size // width, width)
  if "reg_token" in state and not state["reg_token"].size:
    del state["reg_token"]
  if {"reg_token", "cls_token", "pos_embed"} <= state.keys():
    # Registers have no positions; timm adds the position of the CLS token to the token itself.
    token, positions = state["cls_token"], state["pos_embed"]
    dtype = np.result_type(token.dtype, positions.dtype, np.float32)
    state["cls_token"] = Computed(
      (1, 1, width), dtype, lambda: np.asarray(token, dtype) + np.asarray(positions, dtype)[:, :1]
    )
    shape = 1, positions.shape[1] - 1, width
    state["pos_embed"] = changed(positions, lambda array: array[:, 1:], shape)
  if "head.weight" in state:  # CLIP's projection has no bias
    state.setdefault("head.bias", _zeros(state["head.weight"]))


def _split_pooling(state: dict[str, Array]) -> None:
  """Splits the fused projections of SigLIP's pooling head into those of the query and the rest."""
  for leaf in ("weight", "bias"):
    fused = state.pop(f"attn_pool.in_proj_{leaf}", None)
    if fused is not None:
      width = fused.shape[0] // 3
      state[f"attn_pool.q.{leaf}"] = rows(fused, 0, width)
      state[f"attn_pool.kv.{leaf}"] = rows(fused, width, 3 * width)


def _fuse(state: dict[str, Array], attention: str) -> None:
  """Fuses a layer's projections to queries, keys and values; only keys may lack a bias."""
  parts = [f"{attention}{part}" for part in "qkv"]
  if not all(f"{part}.weight" in state for part in parts):
    return  # the check of the names reports what is missing
  has_bias = [f"{part}.bias" in state for part in parts]
  if has_bias == [True, False, True]:
    for part in "qv":
      state[f"{attention}{part}_bias"] = state.pop(f"{attention}{part}.bias")
  elif any(has_bias):
    for part in parts:
      state.setdefault(f"{part}.bias", _zeros(state[f"{part}.weight"]))
    fuse(state, [f"{part}.bias" for part in parts], f"{attention}qkv.bias")
  fuse(state, [f"{part}.weight" for part in parts], f"{attention}qkv.weight")


def _fill_biases(state: dict[str, Array], layer: str) -> None:
  """Adds zero biases if only some of a layer's output projection and MLP have a bias."""
  modules = [f"{layer}attn.proj", *(f"{layer}mlp.{fc}" for fc in ("fc1", "fc1_g", "fc1_x", "fc2"))]
  there = [module for module in modules if f"{module}.weight" in state]
  if any(f"{module}.bias" in state for module in there):
    for module in there:
      state.setdefault(f"{module}.bias", _zeros(state[f"{module}.weight"]))


def _zeros(weight: Array) -> np.ndarray:
  """Returns a bias of zeros for a projection without a bias."""
  return np.zeros(weight.shape[0], np.float32)
