"""Image towers of OpenCLIP and OpenAI's CLIP: their tensor names, configurations and model names.

Cherti et al., `Reproducible scaling laws <https://arxiv.org/abs/2212.07143>`_, 2022;
Radford et al., `CLIP <https://arxiv.org/abs/2103.00020>`_, 2021.
"""

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Collection, Mapping

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects import timm_eva
from vitcomp_jax.weights.dialects.described import Configs, Described, described
from vitcomp_jax.weights.dialects.open_clip_configs import CONFIG, fields_from_config
from vitcomp_jax.weights.dialects.renaming import (
  Array,
  as_head,
  renamed,
  reshaped,
  transposed,
)
from vitcomp_jax.weights.dialects.shapes import fields_from_shapes
from vitcomp_jax.weights.tensors import State

_BUNDLED = "bundled/open_clip_models.json"
TOWER = "visual."
# Only the programs that OpenAI published store these, as tensors; their image towers use QuickGELU.
_OPENAI = ("input_resolution", "context_length", "vocab_size")
# Names beside the image tower: the text tower, a caption decoder, and the scalars of the loss.
BESIDE = (
  r"(transformer|token_embedding|ln_final|text|text_decoder)\..*",
  r"positional_embedding|text_projection|logit_scale|logit_bias|attn_mask",
  "|".join(_OPENAI),
)
PATTERNS = (
  (r"^conv1\.", "patch_embed.proj."),
  (r"^class_embedding$", "cls_token"),
  (r"^positional_embedding$", "pos_embed"),
  (r"^ln_pre\.", "norm_pre."),
  (r"^transformer\.resblocks\.", "blocks."),
  (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
  (r"^(blocks\.\d+)\.ls_([12])\.", r"\1.ls\2."),
  (r"\.attn\.in_proj_", ".attn.qkv."),
  (r"\.attn\.out_proj\.", ".attn.proj."),
  (r"\.attn\.ln_([qk])\.", r".attn.\1_norm."),
  (r"\.attn\.ln_inner\.", ".attn.norm."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
  (r"\.mlp\.ln\.", ".mlp.norm."),
)
# Parts that this library's model lacks, by the names of their tensors.
_REFUSED = {
  r"attn_pool(_contrastive)?\..*": "attentional pooling (CoCa)",
  r"layer\d\..*": "a ResNet as image tower",
  r".*\.attn\.logit_scale": "scaled cosine attention",
  r".*\.attn\.head_scale": "a scale for each head",
  r".*\.ln_attn\..*": "a norm behind attention",
  r"head\.(pool|mlp)\..*": "a head other than a linear projection behind timm's tower",
}


def recognises(names: Collection[str]) -> bool:
  """Returns whether tensors are those of an image tower, with or without the text tower.

  Perception Encoder has similar names, but either pools by a `probe` or has no `ln_post`.
  """
  inside = tower_names(names)
  is_own = {"conv1.weight", "ln_post.weight"} <= inside and "attn_pool.probe" not in inside
  is_resnet = {"conv1.weight", "layer1.0.conv1.weight", "attnpool.positional_embedding"} <= inside
  return is_own or is_resnet or "trunk.patch_embed.proj.weight" in inside


def tower_names(names: Collection[str]) -> set[str]:
  """Returns the names inside an image tower, which may be a whole file or a part of it."""
  tower = TOWER if any(name.startswith(TOWER) for name in names) else ""
  return {name.removeprefix(tower) for name in names if name.startswith(tower)}


def to_timm(tensors: State, configs: Configs | None = None) -> dict[str, Array]:
  """Renames an image tower's tensors to timm's names; drops the text tower.

  Args:
    tensors: Tensors by OpenCLIP's names.
    configs: JSON files beside the weights, by name. OpenCLIP's says whether the last norm comes
      after pooling; without this file, it is assumed to come before.

  Returns:
    Tensors by timm's names; the projection to the space shared with text is the classifier.

  Raises:
    UserError: If the tower has a part that is not supported.
  """
  tensors = image_tower(tensors)
  for pattern, part in _REFUSED.items():
    if found := next((name for name in tensors if re.fullmatch(pattern, name)), None):
      raise UserError(
        f"weights: expected an image tower that is a plain Vision Transformer, got {part} "
        f"({found}); give weights of another model."
      )
  if any(name.startswith("trunk.") for name in tensors):
    return _from_timm_tower(tensors)
  last = "fc_norm" if _fields(configs or {}).get("fc_norm") else "norm"
  return with_axes(renamed(tensors, (*PATTERNS, (r"^ln_post\.", f"{last}."))))


def image_tower(tensors: State) -> State:
  """Returns only the image tower of a file that may also hold a text tower."""
  if not any(name.startswith(TOWER) for name in tensors):
    return tensors
  return renamed(tensors, ((f"^{re.escape(TOWER)}", ""),), BESIDE)


def with_axes(state: dict[str, Array]) -> dict[str, Array]:
  """Adds the batch axis to tokens and positions, and gives the projection the layout of a head."""
  for name in {"cls_token", "pos_embed"} & state.keys():
    width = state[name].shape[-1]
    state[name] = reshaped(state[name], 1, math.prod(state[name].shape) // width, width)
  return state | (as_head(transposed(state.pop("proj"))) if "proj" in state else {})


def _from_timm_tower(tensors: State) -> dict[str, Array]:
  """Renames the tensors of a tower made by timm, and of the projection after it."""
  state = timm_eva.to_timm(renamed(tensors, ((r"^trunk\.", ""),)))
  bias = state.pop("head.proj.bias", None)
  if "head.proj.weight" in state:
    state |= as_head(state.pop("head.proj.weight"), bias)
  return state


def describe(configs: Configs, tensors: State) -> Described | None:
  """Describes a model by its configuration and tensors.

  Without a configuration, the activation, the number of heads, the norms' epsilon and the pooling
  are unknown, except for OpenAI's own files.

  Args:
    configs: JSON files beside the weights, by name.
    tensors: Tensors by OpenCLIP's names.

  Returns:
    The description; None if the tensors are not those of an image tower.

  Raises:
    UserError: If a part of the tower or a value in the configuration is not supported.
  """
  if not recognises(tensors.keys()):
    return None
  config, shapes = _fields(configs), fields_from_shapes(to_timm(tensors, configs))
  authors = _openai(shapes) if set(_OPENAI) & tensors.keys() else {}
  projects = {"projection": True} if shapes.get("num_classes") else {}
  sources = (CONFIG, config), ("names", projects), ("OpenAI's code", authors), ("tensors", shapes)
  return described(*sources)


def _fields(configs: Configs) -> dict[str, object]:
  """Returns the fields that the configuration sets; empty without a configuration."""
  if CONFIG not in configs:
    return {}
  return fields_from_config({"preprocess_cfg": {}, **configs[CONFIG]})


def _openai(shapes: Mapping[str, object]) -> dict[str, object]:
  """Returns the fields that OpenAI's code fixes for all its models."""
  tower = {name: shapes[name] for name in ("width", "patch_size")} | {"layers": shapes["depth"]}
  model = {"vision_cfg": tower, "quick_gelu": True, "embed_dim": shapes["num_classes"]}
  fields = fields_from_config({"model_cfg": model, "preprocess_cfg": {}})
  del fields["image_size"]  # only a default; the positions determine it
  return fields


@functools.cache
def names() -> Mapping[str, Mapping[str, object]]:
  """Returns fields of the spec by OpenCLIP's and OpenAI's model names, such as `ViT-B-32`.

  The activation is that of OpenCLIP's configuration of that name, so OpenAI's weights belong to
  `ViT-B-32-quickgelu`, or to OpenAI's own `ViT-B/32`.
  """
  text = importlib.resources.files("vitcomp_jax").joinpath(_BUNDLED).read_text("utf-8")
  models = json.loads(text)["models"]
  return {name: fields_from_config(config) for name, config in models.items()}
