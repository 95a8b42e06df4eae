"""Reads configurations of OpenCLIP's models, as stored in `open_clip_config.json`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.errors import UserError

CONFIG = "open_clip_config.json"
Values = Mapping[str, Any]

# OpenCLIP's and OpenAI's defaults.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CROP_MODES = {"shortest": "center", "squash": "squash"}
# Supported values of settings that can otherwise add a part that this library's model lacks.
_ALLOWED: Mapping[str, Sequence[object]] = {
  "attentional_pool": (False, None),
  "scaled_cosine_attn": (False, None),
  "scale_heads": (False, None),
  "scale_attn": (False, None),
  "pool_type": ("tok", "avg"),
  "timm_pool": ("map", "token", "avg", ""),
  "timm_proj": ("linear", "none", "", None),
}
_ACTIVATIONS: Mapping[tuple[bool, str], str] = {
  (False, "none"): "gelu",
  (False, "tanh"): "gelu_tanh",
  (True, "none"): "quick_gelu",
}
_TIMM_POOLS = {"map": "map", "token": "cls", "avg": "size_mean"}


def fields_from_config(config: Values) -> dict[str, object]:
  """Returns the fields that a configuration sets for the image tower.

  Args:
    config: `model_cfg`, and `preprocess_cfg` if the preprocessing is known.

  Returns:
    Fields of `models.spec.ViTSpec` by name. For a tower made by timm, these are its `name` in timm
    and what OpenCLIP adds; timm determines the rest.

  Raises:
    UserError: If the configuration sets something that is not supported.
  """
  model = config.get("model_cfg")
  if not isinstance(model, Mapping) or not isinstance(model.get("vision_cfg"), Mapping):
    raise UserError(f"{CONFIG}: expected model_cfg with vision_cfg in it, got {', '.join(config)}.")
  tower: Values = model["vision_cfg"]
  for name, allowed in _ALLOWED.items():
    _check(name, tower.get(name, allowed[0]), allowed)
  fields = _timm_tower(tower) if tower.get("timm_model_name") else _own_tower(model, tower)
  fields["num_classes"] = 0 if tower.get("timm_proj") == "none" else model["embed_dim"]
  return fields | (_preprocess(config["preprocess_cfg"]) if "preprocess_cfg" in config else {})


def _timm_tower(tower: Values) -> dict[str, object]:
  pool = _TIMM_POOLS.get(tower.get("timm_pool", "avg"))
  return {"name": tower["timm_model_name"]} | ({"pool": pool} if pool else {})


def _own_tower(model: Values, tower: Values) -> dict[str, object]:
  """Returns the fields of a tower that is of OpenCLIP's own class."""
  if isinstance(tower.get("layers"), list):
    raise UserError(f"{CONFIG}: layers: expected a number, got {tower['layers']}, a ResNet's.")
  norm, act = tower.get("norm_kwargs") or {}, tower.get("act_kwargs") or {}
  for name, given, known in (("norm_kwargs", norm, "eps"), ("act_kwargs", act, "approximate")):
    if set(given) - {known}:
      raise UserError(f"{CONFIG}: {name}: expected {known} and nothing else, got {given}.")
  approximate = act.get("approximate", "none")
  quick = bool(model.get("quick_gelu"))
  _check("act_kwargs.approximate", approximate, [key[1] for key in _ACTIVATIONS if key[0] == quick])
  width, side = tower.get("width", 768), tower.get("image_size", 224)
  norms_pooled = bool(tower.get("final_ln_after_pool"))
  return {
    "image_size": (side, side) if isinstance(side, int) else tuple(side),
    "patch_size": tower.get("patch_size", 16),
    "width": width,
    "depth": tower.get("layers", 12),
    "num_heads": width // tower.get("head_width", 64),
    "mlp_dim": int(width * tower.get("mlp_ratio", 4.0)),
    "class_token": True,
    "pos_on_prefix": True,
    "norm_pre": not tower.get("no_ln_pre"),
    "patch_bias": False,
    "layer_scale": tower.get("ls_init_value") is not None,
    "qk_norm": bool(tower.get("qk_norm")),
    "attn_norm": bool(tower.get("scale_attn_inner")),
    "mlp_norm": bool(tower.get("scale_fc")),
    "activation": _ACTIVATIONS[quick, approximate],
    "norm_eps": norm.get("eps", 1e-5),
    "pool": "size_mean" if tower.get("pool_type", "tok") == "avg" else "cls",
    "final_norm": not norms_pooled,
    "fc_norm": norms_pooled,
  }


def _preprocess(config: Values) -> dict[str, object]:
  """Returns the preprocessing, with OpenCLIP's defaults for values that are not set."""
  fields: dict[str, object] = {
    "mean": tuple(config.get("mean") or _MEAN),
    "std": tuple(config.get("std") or _STD),
    "interpolation": config.get("interpolation") or "bicubic",
    "crop_pct": 1.0,
  }
  resize = config.get("resize_mode") or "shortest"
  if resize in _CROP_MODES:
    return fields | {"crop_mode": _CROP_MODES[resize]}
  logging.warning(
    "%s: resize_mode %r, which pads images, is not supported: give images of the model's size",
    *(CONFIG, resize),
  )
  return fields


def _check(name: str, value: object, allowed: Sequence[object]) -> None:
  if value not in allowed:
    expected = " or ".join(repr(each) for each in allowed if each is not None)
    raise UserError(f"{CONFIG}: {name}: expected {expected}, got {value!r}; it is not supported.")
