"""Writes the settings of Hugging Face transformers for a model that this library changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.huggingface_configs import Config, Family
from vitcomp_jax.weights.dialects.shapes import fields_from_shapes
from vitcomp_jax.weights.tensors import State

TOWERS = ("CLIP", "Siglip", "Siglip2")  # their configs may be part of the config of a whole model
BEITS = ("Beit", "Data2VecVision")
_OBLONG = ("ViT", "DeiT", "IJepa", "DINOv3ViT", *BEITS)  # accept images that are not square
_MAX_RATIO = 64


def settings_of(
  family: Family, settings: Config, state: State, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the settings of an encoder.

  Args:
    family: The encoder's family.
    settings: Settings of the checkpoint that the model came from.
    state: The model's tensors by timm's names.
    fields: All fields of the model's spec.

  Raises:
    UserError: If the family's configuration cannot express a size.
  """
  found: dict[str, Any] = fields_from_shapes(state)
  height, width = fields["image_size"]
  if height != width and family.name not in _OBLONG:
    raise UserError(
      f"transformers: expected a square image size for {family.name}, got {height} by {width}."
    )
  written = dict(settings) | {"num_hidden_layers": found["depth"]}
  if found["depth"] != settings.get("num_hidden_layers", found["depth"]):
    for name in ("out_features", "out_indices", "stage_names"):
      written.pop(name, None)  # they name layers
  if family.name == "Siglip2":
    written["num_patches"] = (height // found["patch_size"]) ** 2
  else:
    written["image_size"] = height if height == width else [height, width]
  if family.name.startswith("Dinov2"):
    written["mlp_ratio"] = _ratio(family, found)
  else:
    written["intermediate_size"] = found["mlp_dim"]
  if family.name in BEITS:
    written["use_mean_pooling"] = not found["final_norm"]
    written["use_mask_token"] = False
  elif family.name == "DINOv3ViT":
    bias = found["qkv_bias"]
    written |= {"query_bias": bool(bias), "key_bias": bias == "qkv", "value_bias": bool(bias)}
    written |= {"proj_bias": found["linear_bias"], "mlp_bias": found["linear_bias"]}
  elif family.name not in TOWERS:
    written["qkv_bias"] = bool(found["qkv_bias"])
  return _with_dtype(written, state)


def tower_config(kind: str, config: Config, settings: Config, state: State) -> dict[str, Any]:
  """Returns the configuration for a class of CLIP or SigLIP.

  Args:
    kind: Name of the class.
    config: The configuration of the checkpoint that the model came from.
    settings: The new settings of the image tower.
    state: The model's tensors by timm's names.
  """
  base = str(config["model_type"]).removesuffix("_vision_model")
  tower = dict(settings) | {"model_type": f"{base}_vision_model"}
  if base != "clip":
    tower["vision_use_head"] = "attn_pool.latent" in state
  if not kind.endswith("ForImageClassification"):
    if kind.endswith("WithProjection"):
      tower["projection_dim"] = state["head.weight"].shape[0]
    return tower
  whole = dict(config) if "vision_config" in config else {}
  return _with_dtype(whole, state) | {"model_type": base, "vision_config": tower}


def labels_of(config: Config, count: int, class_names: Sequence[str]) -> dict[str, Any]:
  """Returns the settings that name a classifier's outputs, with numbers if they have no names."""
  names = list(class_names) or [f"LABEL_{index}" for index in range(count)]
  before = config.get("id2label")
  if not class_names and isinstance(before, Mapping) and len(before) == count:
    return {}
  return {
    "id2label": {str(index): name for index, name in enumerate(names)},
    "label2id": {name: index for index, name in enumerate(names)},
  }


def _ratio(family: Family, found: Mapping[str, Any]) -> int:
  """Returns DINOv2's ratio of hidden units to the width, which must be an integer."""
  width, hidden = found["width"], found["mlp_dim"]
  for ratio in range(1, _MAX_RATIO + 1):
    units = ratio * width
    if found["mlp"] != "mlp":
      units = (units * 2 // 3 + 7) // 8 * 8  # so that gates do not add weights
    if units == hidden:
      return ratio
  raise UserError(
    f"transformers: expected hidden units that a whole mlp_ratio of the width {width} gives for "
    f"{family.name}, got {hidden}."
  )


def _with_dtype(config: Config, state: State) -> dict[str, Any]:
  """Returns the settings, with any precision replaced by that of the tensors."""
  dtype = state["patch_embed.proj.weight"].dtype.name
  return dict(config) | {name: dtype for name in ("dtype", "torch_dtype") if name in config}
