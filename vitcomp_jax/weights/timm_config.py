"""Reads the config.json that timm writes beside weights, as on the hub."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.described import Configs

CONFIG = "config.json"
_POOLS = {"token": "cls", "avg": "size_mean", "map": "map"}
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_tanh": "gelu_tanh",
  "quick_gelu": "quick_gelu",
  "quickgelu": "quick_gelu",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
_NORMS = {"layernorm": "layer", "rmsnorm": "rms"}
_ROTARY = {"cat": "index", "dinov3": "centred", "mixed": "mixed"}
# Arguments of timm's classes, and the fields that correspond to them.
_RENAMED = {
  "embed_dim": "width",
  "depth": "depth",
  "num_heads": "num_heads",
  "patch_size": "patch_size",
  "in_chans": "in_chans",
  "class_token": "class_token",
  "reg_tokens": "num_registers",
  "num_reg_tokens": "num_registers",
  "qk_norm": "qk_norm",
  "pool_include_prefix": "pool_prefix",
  "use_post_norm": "norm_after",
  "attn_pool_num_heads": "pool_heads",
}
# Arguments that can also be read from the tensors, or that matter only in training.
_IGNORED = frozenset(
  """attn_drop_rate attn_pool_mlp_ratio dynamic_img_pad dynamic_img_size drop_path_rate drop_rate
  fc_norm final_norm fix_init head_init_scale init_values mlp_ratio num_classes patch_drop_rate
  pos_drop_rate pos_embed pre_norm proj_bias proj_drop_rate qkv_bias qkv_fused rope_jitter_coords
  rope_rescale_coords rope_shift_coords scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm
  swiglu_align_to swiglu_mlp use_abs_pos_emb use_fc_norm use_post_transformer_norm
  use_pre_transformer_norm use_rel_pos_bias use_shared_rel_pos_bias weight_init""".split()
)


def architecture(configs: Configs) -> str | None:
  """Returns the name of timm's model; None without a timm config."""
  name = configs.get(CONFIG, {}).get("architecture")
  return name if isinstance(name, str) else None


def tag(configs: Configs) -> str | None:
  """Returns `NAME.TAG` of the weights; None if the config has no tag."""
  name, pretrained = architecture(configs), _mapping(configs.get(CONFIG, {}), "pretrained_cfg")
  found = pretrained.get("tag")
  return f"{name}.{found}" if name and isinstance(found, str) and found else None


def has_arguments(configs: Configs) -> bool:
  """Returns whether the config lists arguments that differ from those of timm's named model."""
  return "model_args" in configs.get(CONFIG, {})


def class_names(configs: Configs) -> tuple[str, ...]:
  """Returns the names of the classifier's outputs; empty unless the config has a name for each."""
  config = configs.get(CONFIG, {})
  names = config.get("label_names")
  if isinstance(names, Mapping):
    names = [names[key] for key in sorted(names, key=int)]
  is_whole = isinstance(names, list) and len(names) == config.get("num_classes")
  return tuple(map(str, names)) if isinstance(names, list) and is_whole else ()


def model_fields(configs: Configs, source: str) -> dict[str, Any]:
  """Returns the fields in which the model differs from timm's model of that name.

  Args:
    configs: JSON files beside the weights, by name.
    source: The weights, for messages.

  Raises:
    UserError: If this library does not know an argument of the model.
  """
  config = configs.get(CONFIG, {})
  arguments = dict(_mapping(config, "model_args"))
  if isinstance(pool := config.get("global_pool"), str):
    arguments.setdefault("global_pool", pool)
  fields: dict[str, Any] = {}
  for name, value in arguments.items():
    fields |= _field(name, value, source)
  if rotary := _rotary(arguments):
    fields["rotary"] = rotary
  return fields


def image_fields(configs: Configs) -> dict[str, object]:
  """Returns the preprocessing and image size in timm's `pretrained_cfg`."""
  pretrained = _mapping(configs.get(CONFIG, {}), "pretrained_cfg")
  fields: dict[str, object] = {}
  for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
    if pretrained.get(name) is not None:
      value = pretrained[name]
      fields[name] = tuple(value) if isinstance(value, list) else value
  size = pretrained.get("input_size")
  if isinstance(size, Sequence) and len(size) == 3:
    fields["image_size"] = _pair(size[1:])
  return fields


def _mapping(values: Mapping[str, object], key: str) -> Mapping[str, object]:
  found = values.get(key)
  return found if isinstance(found, Mapping) else {}


def _field(name: str, value: object, source: str) -> dict[str, object]:
  """Returns the field, if any, that an argument of a timm class sets."""
  if name in _RENAMED:
    return {_RENAMED[name]: value}
  if name in _IGNORED or name.startswith(("rope_", "use_rot_pos_emb", "ref_feat_shape")):
    return {}
  if name == "img_size":
    return {"image_size": _pair(value)}
  if name == "no_embed_class":
    return {"pos_on_prefix": not value}
  tables = {"global_pool": ("pool", _POOLS), "act_layer": ("activation", _ACTIVATIONS)}
  tables["norm_layer"] = ("norm", _NORMS)
  if name not in tables:
    raise UserError(
      f"weights {source}: expected arguments of timm's models that this library knows, got "
      f"{name}={value!r} in the model_args of {CONFIG}."
    )
  field, table = tables[name]
  if not isinstance(value, str) or value not in table:
    raise UserError(
      f"weights {source}: expected {name} among {', '.join(table)} in {CONFIG}, got {value!r}."
    )
  return {field: table[value]}


def _rotary(arguments: Mapping[str, object]) -> dict[str, object]:
  """Returns the fields of the rotary embedding that arguments of timm's `Eva` set."""
  fields: dict[str, object] = {}
  for name, field in (
    ("rope_temperature", "temperature"),
    ("rope_grid_offset", "offset"),
    ("rope_rotate_half", "halves"),
  ):
    if name in arguments:
      fields[field] = arguments[name]
  if "rope_grid_indexing" in arguments:
    fields["columns_first"] = arguments["rope_grid_indexing"] == "xy"
  if "rope_type" in arguments:
    fields["kind"] = _ROTARY[str(arguments["rope_type"])]
  if arguments.get("ref_feat_shape") is not None:
    fields["reference"] = _pair(arguments["ref_feat_shape"])
  return fields


def _pair(value: object) -> tuple[int, int]:
  if isinstance(value, Sequence):
    height, width = value
    return int(height), int(width)
  return int(str(value)), int(str(value))
