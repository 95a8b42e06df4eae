"""Converts configurations of Hugging Face transformers to fields of a spec."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vitcomp_jax.errors import UserError

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
  """What the classes for one kind of model fix, and the defaults of their configuration.

  Attributes:
    name: First part of the classes' names.
    norm_eps: Default of `layer_norm_eps`.
    num_heads: Default of `num_attention_heads`.
    activation: Default of `hidden_act`.
    pool: Pooling of features.
    classifier_pool: Pooling of classifiers.
    any_size: Whether images of any size are accepted, by resampling positions.
    antialias: Whether positions are resampled with antialiasing.
    processor: First part of the name of the class that preprocesses images.
  """

  name: str
  norm_eps: float
  num_heads: int = 12
  activation: str = "gelu"
  pool: str = "cls"
  classifier_pool: str = "cls"
  any_size: bool = False
  antialias: bool = False
  processor: str = "ViT"


_TANH = "gelu_pytorch_tanh"
FAMILIES = {
  "vit": Family("ViT", 1e-12),
  "deit": Family("DeiT", 1e-12, processor="DeiT"),
  "vit_mae": Family("ViTMAE", 1e-12),
  "dinov2": Family("Dinov2", 1e-6, classifier_pool="cls_mean", any_size=True, processor="Bit"),
  "dinov2_with_registers": Family(
    "Dinov2WithRegisters",
    1e-6,
    classifier_pool="cls_mean",
    any_size=True,
    antialias=True,
    processor="Bit",
  ),
  "dinov3_vit": Family("DINOv3ViT", 1e-5, num_heads=6, any_size=True, processor="DINOv3ViT"),
  "clip": Family(
    "CLIP", 1e-5, activation="quick_gelu", classifier_pool="size_mean", processor="CLIP"
  ),
  "siglip": Family(
    "Siglip", 1e-6, 12, _TANH, "size_mean", classifier_pool="size_mean", processor="Siglip"
  ),
  "siglip2": Family(
    "Siglip2", 1e-6, 12, _TANH, "size_mean", classifier_pool="size_mean", processor="Siglip2"
  ),
  "ijepa": Family("IJepa", 1e-12, pool="size_mean", classifier_pool="size_mean"),
  "beit": Family("Beit", 1e-12, processor="Beit"),
  "data2vec-vision": Family("Data2VecVision", 1e-12, processor="Beit"),
}
_CLASSES = (
  r"(Vision)?Model(WithProjection)?|Backbone|ForPreTraining|ForMaskedImageModeling"
  r"|ForImageClassification(WithTeacher)?"
)
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
# Settings that must agree with the tensors, which determine them.
_SIZES = {
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_channels": "in_chans",
  "patch_size": "patch_size",
}


def family_of(config: Config) -> tuple[Family, Config]:
  """Returns the family of a configuration's model, and the settings of its image encoder.

  Raises:
    UserError: If this library does not support the model.
  """
  kind = str(config["model_type"])
  kind, settings = kind.removesuffix("_vision_model"), config
  if isinstance(settings.get("vision_config"), Mapping):
    settings = settings["vision_config"]
  if kind not in FAMILIES:
    raise UserError(
      f"config.json: expected a model_type of {', '.join(FAMILIES)}, got {kind!r}, which is no "
      "plain Vision Transformer that this library has."
    )
  family = FAMILIES[kind]
  for name in architectures(config):
    if not re.fullmatch(f"{family.name}({_CLASSES})", name):
      raise UserError(
        f"config.json: expected architectures to be a model or an image classifier of "
        f"{family.name}, got {name!r}; save one of these."
      )
  return family, settings


def architectures(config: Config) -> tuple[str, ...]:
  """Returns the names of the classes that a configuration is for."""
  names = config.get("architectures")
  return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def is_classifier(config: Config, names: Collection[str]) -> bool:
  """Returns whether a checkpoint is that of a classifier, which may have no outputs.

  Args:
    config: The configuration; empty if unknown.
    names: transformers' names of the tensors.
  """
  is_said = any("ForImageClassification" in name for name in architectures(config))
  return is_said or has(names, "classifier.weight") or has(names, "cls_classifier.weight")


def fields_of(config: Config, found: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
  """Returns the fields of a spec that a configuration sets.

  Args:
    config: The configuration.
    found: Fields that the tensors determine.
    names: transformers' names of the tensors.

  Raises:
    UserError: If this library's model does not support a setting, or the tensors do not match it.
  """
  family, settings = family_of(config)
  patch_size = _square(settings, "patch_size", found["patch_size"])
  for setting, field in _SIZES.items():
    said = patch_size if setting == "patch_size" else settings.get(setting, found[field])
    if said != found[field]:
      raise UserError(
        f"config.json: expected {setting} {found[field]} as the tensors have, got {said}; give "
        "the weights that belong to it."
      )
  heads = int(settings.get("num_attention_heads", family.num_heads))
  head_dim = settings.get("head_dim") or found["width"] / heads
  if head_dim * heads != found["width"] or head_dim != int(head_dim):
    raise UserError(
      f"config.json: expected num_attention_heads that share the width {found['width']}, got "
      f"{heads} of {head_dim:g} channels each."
    )
  activation = str(settings.get("hidden_act", family.activation))
  if family.name.startswith("Dinov2") and found["mlp"] != "mlp":
    activation = "silu"  # whatever the configuration says
  if activation not in _ACTIVATIONS:
    raise UserError(
      f"config.json: expected a hidden_act of {', '.join(_ACTIVATIONS)}, got {activation!r}."
    )
  image_size = _image_size(family, settings, patch_size)
  if "relative_bias" in found and image_size[0] // patch_size != image_size[1] // patch_size:
    raise UserError(
      f"config.json: expected a square image_size, got {image_size}: {family.name} resamples its "
      "relative positions of other images, which is not supported."
    )
  return {
    "image_size": image_size,
    "num_heads": heads,
    "norm_eps": float(settings.get("layer_norm_eps", family.norm_eps)),
    "activation": _ACTIVATIONS[activation],
    "pool": _pool(family, config, settings, found["final_norm"], names),
    "pos_on_prefix": not found["num_registers"],
    "rotary": _rotary(settings) if family.name == "DINOv3ViT" else None,
    "antialias": family.antialias,
  }


def class_names(config: Config, num_classes: int) -> tuple[str, ...]:
  """Returns the names of a classifier's outputs; empty if the names are only numbers.

  Raises:
    UserError: If the number of names differs from the number of outputs.
  """
  labels = config.get("id2label")
  if not isinstance(labels, Mapping):
    return ()
  by_index = {int(index): str(label) for index, label in labels.items()}
  names = tuple(by_index[index] for index in sorted(by_index))
  if names == tuple(f"LABEL_{index}" for index in range(len(names))):
    return ()
  if sorted(by_index) != list(range(num_classes)):
    raise UserError(
      f"config.json: expected id2label to name the classifier's {num_classes} outputs from 0 on, "
      f"got {len(names)} names; correct it or remove it."
    )
  return names


def _square(settings: Config, name: str, default: object) -> int:
  """Returns a side length, which may be given as equal height and width."""
  value = settings.get(name, default)
  height, width = value if isinstance(value, list | tuple) else (value, value)
  if height != width:
    raise UserError(f"config.json: expected a square {name}, got {height} by {width}.")
  return int(height)


def _image_size(family: Family, settings: Config, patch_size: int) -> tuple[int, int]:
  if family.name == "Siglip2":
    # Its positions form a square grid, and are resampled for each image with another grid.
    side = math.isqrt(settings.get("num_patches", 256)) * patch_size
    return side, side
  value = settings.get("image_size", 224)
  height, width = value if isinstance(value, list | tuple) else (value, value)
  return int(height), int(width)


def _pool(
  family: Family, config: Config, settings: Config, final_norm: object, names: Collection[str]
) -> str:
  if has(names, "distillation_classifier.weight"):
    return "cls_dist"
  if family.name in ("Beit", "Data2VecVision"):
    # With mean pooling the norm comes after the mean; if it comes before, CLS is read.
    is_mean = settings.get("use_mean_pooling", True) and not final_norm
    return "size_mean" if is_mean else "cls"
  if is_classifier(config, names):
    return family.classifier_pool
  return "map" if has(names, "head.probe") else family.pool


def has(names: Collection[str], last: str) -> bool:
  """Returns whether a name ends with whole parts, such as `classifier.weight`."""
  return any(name == last or name.endswith(f".{last}") for name in names)


def _rotary(settings: Config) -> dict[str, object]:
  theta = float(settings.get("rope_theta", 100.0))
  return {"kind": "centred", "temperature": theta, "halves": True}
