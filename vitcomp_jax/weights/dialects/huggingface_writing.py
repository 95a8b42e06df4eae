"""Converts models to checkpoints of Hugging Face transformers that `from_pretrained` loads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects import huggingface_names as layouts
from vitcomp_jax.weights.dialects.huggingface import describe
from vitcomp_jax.weights.dialects.huggingface_configs import Config, Family, family_of
from vitcomp_jax.weights.dialects.huggingface_settings import (
  BEITS,
  TOWERS,
  labels_of,
  settings_of,
  tower_config,
)
from vitcomp_jax.weights.dialects.renaming import Array, changed, fuse, reshaped, rows, thirds
from vitcomp_jax.weights.dialects.shapes import fields_from_shapes
from vitcomp_jax.weights.tensors import State, concatenate

# Prefix of the encoder in classifiers, and its layouts without and with gates.
_PLACES = {
  "ViT": ("vit.", layouts.VIT, layouts.VIT),
  "ViTMAE": ("vit.", layouts.VIT, layouts.VIT),
  "DeiT": ("deit.", layouts.VIT, layouts.VIT),
  "IJepa": ("ijepa.", layouts.VIT, layouts.VIT),
  "Beit": ("beit.", layouts.VIT, layouts.VIT),
  "Data2VecVision": ("data2vec_vision.", layouts.VIT, layouts.VIT),
  "Dinov2": ("dinov2.", layouts.DINOV2, layouts.DINOV2_GATED),
  "Dinov2WithRegisters": ("dinov2_with_registers.", layouts.DINOV2, layouts.DINOV2_GATED),
  "DINOv3ViT": ("", layouts.DINOV3, layouts.DINOV3_GATED),
  "CLIP": ("vision_model.", layouts.CLIP, layouts.CLIP),
  "Siglip": ("vision_model.", layouts.CLIP, layouts.CLIP),
  "Siglip2": ("vision_model.", layouts.CLIP, layouts.CLIP),
}
# Fields in which the configuration and the class must agree with the spec.
_COMPARED = """activation class_token distilled fc_norm final_norm image_size norm norm_eps norm_pre
num_classes num_heads num_registers patch_size pool positions relative_bias width""".split()


def to_huggingface(
  state: State, config: Config, fields: Mapping[str, Any], class_names: Sequence[str] = ()
) -> tuple[dict[str, Array], dict[str, Any]]:
  """Returns a model's tensors and configuration in the form of transformers.

  The class is a classifier if the model has a classifier, or else the bare model: for CLIP and
  SigLIP only the image tower, for pre-training only the encoder. Parameters that do not affect the
  model's output are those of a new model (a mask token), or missing (a pooler), so that
  transformers initialises them.

  Args:
    state: Tensors by timm's names.
    config: Content of the `config.json` of the checkpoint that the model came from.
    fields: All fields of the model's spec by name; `rotary` as a dict.
    class_names: Names of the classifier's outputs; empty if unknown.

  Returns:
    Tensors by transformers' names, and the new content of `config.json`.

  Raises:
    UserError: If no class of transformers can represent the model; the message gives the reason.
  """
  if config["model_type"] == "vit_mae" and "head.weight" in state:
    config = {**config, "model_type": "vit", "architectures": ["ViTModel"]}  # for fine-tuning
  family, settings = family_of(config)
  kind = _class_of(family, state)
  _check_widths(kind, state)
  tensors = _renamed(family, kind, state)
  written = settings_of(family, settings, state, fields)
  if family.name in TOWERS:
    written = tower_config(kind, config, written, state)
  if "head.weight" in state and not kind.endswith("WithProjection"):
    written |= labels_of(written, state["head.weight"].shape[0], class_names)
  written["architectures"] = [kind]
  _check(kind, written, tensors, fields)
  return tensors, written


def _class_of(family: Family, state: State) -> str:
  """Returns the name of the class that represents a model."""
  name = family.name
  if "head_dist.weight" in state:
    return f"{name}ForImageClassificationWithTeacher"
  if name == "CLIP" and {"head.weight", "fc_norm.weight"} <= set(state):
    if np.any(np.asarray(state["head.bias"])):
      raise UserError(
        "transformers: expected a projection without a bias for CLIPVisionModelWithProjection, got "
        "one that training changed."
      )
    return "CLIPVisionModelWithProjection"
  if "head.weight" not in state:
    return f"{name}VisionModel" if name in TOWERS else f"{name}Model"
  if name == "DINOv3ViT":
    raise UserError("transformers: expected features, got a classifier, which DINOv3ViT has not.")
  return f"{name}ForImageClassification"


def _check_widths(kind: str, state: State) -> None:
  """Rejects layers whose widths a configuration cannot express."""
  width = state["patch_embed.proj.weight"].shape[0]
  inner = {state[f"{layer}attn.qkv.weight"].shape[0] for layer in _layers(state)}
  hidden = {state[f"{layer}mlp.fc2.weight"].shape[1] for layer in _layers(state)}
  pool = state.get("attn_pool.mlp.fc2.weight")
  hidden |= set() if pool is None else {pool.shape[1]}
  if inner != {3 * width}:
    raise UserError(
      f"transformers: expected heads that share the width {width} for {kind}, got slimmed ones, of "
      f"{', '.join(map(str, sorted(inner)))} channels of queries, keys and values instead of "
      f"{3 * width}."
    )
  if len(hidden) > 1:
    raise UserError(
      f"transformers: expected as many hidden units in each MLP for {kind}, got slimmed ones, of "
      f"{', '.join(map(str, sorted(hidden)))}."
    )


def _renamed(family: Family, kind: str, state: State) -> dict[str, Array]:
  """Returns the tensors with the names and shapes of a class."""
  prefix, plain, gated = _PLACES[family.name]
  is_gated = fields_from_shapes(state)["mlp"] != "mlp"
  layout = gated if is_gated else plain
  parts = dict(state)
  for layer in _layers(state):
    _split_attention(family, parts, f"{layer}attn.")
    _arrange_mlp(parts, f"{layer}mlp.", layout)
  _restore_stem(family, kind, parts)
  is_bare = kind.endswith("Model") and family.name not in TOWERS
  heads = {"head": "classifier", "head_dist": "distillation_classifier"}
  if kind.endswith("WithProjection"):
    heads["head"] = "visual_projection"
    del parts["head.bias"]
  elif kind.endswith("WithTeacher"):
    heads["head"] = "cls_classifier"
  tensors: dict[str, Array] = {}
  for name, tensor in parts.items():
    module, _, leaf = name.rpartition(".")
    theirs = layout.name(name)
    if module in heads:
      tensors[f"{heads[module]}.{leaf}"] = tensor
    elif theirs is not None:
      tensors[theirs if is_bare else prefix + theirs] = tensor
    else:
      raise UserError(f"transformers: expected parameters that {kind} has, got {name} too.")
  return tensors


def _layers(state: State) -> list[str]:
  """Returns the prefix of the names of each layer."""
  found = (re.match(r"blocks\.\d+\.", name) for name in state)
  return list(dict.fromkeys(match[0] for match in found if match))


def _split_attention(family: Family, state: dict[str, Array], attention: str) -> None:
  """Splits queries, keys and values, and adds the biases that the class has."""
  weights = thirds(state.pop(f"{attention}qkv.weight"))
  biases: dict[str, Array] = {}
  if f"{attention}qkv.bias" in state:
    biases = dict(zip("qkv", thirds(state.pop(f"{attention}qkv.bias")), strict=True))
  elif f"{attention}q_bias" in state:
    biases = {part: state.pop(f"{attention}{part}_bias") for part in "qv"}
  if family.name in BEITS:
    if "k" in biases:
      raise UserError(f"transformers: expected keys without a bias for {family.name}, got one.")
    needed = "qv"
  elif family.name == "DINOv3ViT":
    needed = ""  # its configuration says which have biases
  else:
    needed = "qkv" if biases or family.name in TOWERS else ""
  for part, weight in zip("qkv", weights, strict=True):
    state[f"{attention}{part}.weight"] = weight
    if part in biases or part in needed:
      state[f"{attention}{part}.bias"] = biases.get(part, np.zeros(weight.shape[0], np.float32))


def _arrange_mlp(state: dict[str, Array], mlp: str, layout: layouts.Layout) -> None:
  """Joins or splits the projections to gates and values, as the class requires."""
  is_split = f"{mlp}fc1_g.weight" in state
  if layout is layouts.DINOV2_GATED and is_split:
    for leaf in ("weight", "bias"):
      fuse(state, [f"{mlp}fc1_g.{leaf}", f"{mlp}fc1_x.{leaf}"], f"{mlp}fc1.{leaf}")
  if layout is layouts.DINOV3_GATED and not is_split:
    for leaf in ("weight", "bias"):
      if (both := state.pop(f"{mlp}fc1.{leaf}", None)) is not None:
        half = both.shape[0] // 2
        state[f"{mlp}fc1_g.{leaf}"] = rows(both, 0, half)
        state[f"{mlp}fc1_x.{leaf}"] = rows(both, half, 2 * half)


def _restore_stem(family: Family, kind: str, state: dict[str, Array]) -> None:
  """Gives the tensors before and after the layers the shapes of the class."""
  width = state["patch_embed.proj.weight"].shape[0]
  if family.name == "Dinov2WithRegisters" and "reg_token" in state:
    # The position of CLS is already part of the token.
    none = np.zeros((1, 1, width), np.float32)
    state["pos_embed"] = concatenate([none, state["pos_embed"]], axis=1)
  if family.name in ("Dinov2WithRegisters", "DINOv3ViT"):
    state.setdefault("reg_token", np.zeros((1, 0, width), np.float32))
  if family.name.startswith("Dinov2"):
    state["mask_token"] = np.zeros((1, width), np.float32)
  if family.name == "DINOv3ViT":
    state["mask_token"] = np.zeros((1, 1, width), np.float32)
  if family.name in TOWERS:
    _restore_tower(family, kind, state)


def _restore_tower(family: Family, kind: str, state: dict[str, Array]) -> None:
  """Gives the tensors before and after the layers the shapes of CLIP's and SigLIP's towers."""
  kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
  width = kernel.shape[0]
  state["pos_embed"] = reshaped(positions, positions.shape[1], width)
  if "cls_token" in state:
    state["cls_token"] = reshaped(state["cls_token"], width)
  if family.name == "Siglip2":
    size = kernel.size // width
    state["patch_embed.proj.weight"] = changed(
      kernel, lambda array: array.transpose(0, 2, 3, 1).reshape(width, size), (width, size)
    )
  for leaf, start in (("weight", np.ones), ("bias", np.zeros)):
    if f"attn_pool.q.{leaf}" in state:
      parts = [f"attn_pool.q.{leaf}", f"attn_pool.kv.{leaf}"]
      fuse(state, parts, f"attn_pool.in_proj_{leaf}")
    if f"fc_norm.{leaf}" in state:
      state[f"norm.{leaf}"] = state.pop(f"fc_norm.{leaf}")
    elif kind == "CLIPForImageClassification":
      state[f"norm.{leaf}"] = start(width, np.float32)  # the class has it but does not use it


def _check(kind: str, config: Config, tensors: State, fields: Mapping[str, Any]) -> None:
  """Rejects a model that its class would compute differently."""
  read = describe({"config.json": config}, tensors)
  assert read is not None
  for name in _COMPARED:
    if name in read.fields and read.fields[name] != fields[name]:
      raise UserError(
        f"transformers: expected a model whose {name} is {read.fields[name]}, as that of {kind} "
        f"is, got {fields[name]}."
      )
  rotary: Any = read.fields["rotary"]
  given = fields["rotary"]
  if rotary != (given and {name: given[name] for name in rotary or {}}):
    raise UserError(
      f"transformers: expected a rotary embedding of {rotary} for {kind}, got {given}."
    )
