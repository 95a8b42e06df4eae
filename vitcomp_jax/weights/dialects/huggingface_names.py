"""Names that Hugging Face transformers gives the parameters of its Vision Transformers.

Each table maps timm's names of modules and parameters to those that `save_pretrained` writes.
Queries, keys and values are separate; they are called `attn.q`, `attn.k` and `attn.v` here.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping

_TABLE = "relative_position_bias.relative_position_bias_table"

_VIT_LAYER = {
  "norm1": "layernorm_before",
  "attn.q": "attention.attention.query",
  "attn.k": "attention.attention.key",
  "attn.v": "attention.attention.value",
  "attn.proj": "attention.output.dense",
  "attn.relative_position_bias_table": f"attention.attention.{_TABLE}",
  "norm2": "layernorm_after",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
  "ls1.gamma": "lambda_1",
  "ls2.gamma": "lambda_2",
}
_DINOV2_LAYER = {
  "norm1": "norm1",
  "attn.q": "attention.attention.query",
  "attn.k": "attention.attention.key",
  "attn.v": "attention.attention.value",
  "attn.proj": "attention.output.dense",
  "ls1.gamma": "layer_scale1.lambda1",
  "norm2": "norm2",
  "mlp.fc1": "mlp.fc1",
  "mlp.fc2": "mlp.fc2",
  "ls2.gamma": "layer_scale2.lambda1",
}
_DINOV2_GATED_LAYER = _DINOV2_LAYER | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_DINOV3_LAYER = {
  "norm1": "norm1",
  "attn.q": "attention.q_proj",
  "attn.k": "attention.k_proj",
  "attn.v": "attention.v_proj",
  "attn.proj": "attention.o_proj",
  "ls1.gamma": "layer_scale1.lambda1",
  "norm2": "norm2",
  "mlp.fc1": "mlp.up_proj",
  "mlp.fc2": "mlp.down_proj",
  "ls2.gamma": "layer_scale2.lambda1",
}
_DINOV3_GATED_LAYER = _DINOV3_LAYER | {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj"}
_CLIP_LAYER = {
  "norm1": "layer_norm1",
  "attn.q": "self_attn.q_proj",
  "attn.k": "self_attn.k_proj",
  "attn.v": "self_attn.v_proj",
  "attn.proj": "self_attn.out_proj",
  "norm2": "layer_norm2",
  "mlp.fc1": "mlp.fc1",
  "mlp.fc2": "mlp.fc2",
}
_VIT_STEM = {
  "cls_token": "embeddings.cls_token",
  "dist_token": "embeddings.distillation_token",
  "reg_token": "embeddings.register_tokens",
  "mask_token": "embeddings.mask_token",
  "pos_embed": "embeddings.position_embeddings",
  "patch_embed.proj": "embeddings.patch_embeddings.projection",
  "rel_pos_bias.relative_position_bias_table": f"encoder.{_TABLE}",
  "norm": "layernorm",
  "fc_norm": "pooler.layernorm",
}
_DINOV3_STEM = {
  "cls_token": "embeddings.cls_token",
  "reg_token": "embeddings.register_tokens",
  "mask_token": "embeddings.mask_token",
  "patch_embed.proj": "embeddings.patch_embeddings",
  "norm": "norm",
}
_CLIP_STEM = {
  "cls_token": "embeddings.class_embedding",
  "pos_embed": "embeddings.position_embedding.weight",
  "patch_embed.proj": "embeddings.patch_embedding",
  "norm_pre": "pre_layrnorm",
  "norm": "post_layernorm",
  "attn_pool.latent": "head.probe",
  "attn_pool.in_proj_weight": "head.attention.in_proj_weight",
  "attn_pool.in_proj_bias": "head.attention.in_proj_bias",
  "attn_pool.proj": "head.attention.out_proj",
  "attn_pool.norm": "head.layernorm",
  "attn_pool.mlp.fc1": "head.mlp.fc1",
  "attn_pool.mlp.fc2": "head.mlp.fc2",
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of an encoder's modules and parameters, by timm's names.

  Attributes:
    layers: Prefix of a layer, with `{}` for its number from 0.
    layer: Names within a layer.
    stem: Names outside the layers.
  """

  layers: str
  layer: Mapping[str, str]
  stem: Mapping[str, str]

  def name(self, name: str) -> str | None:
    """Returns the name of a parameter; None if the layout has no such parameter.

    Args:
      name: timm's name.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
      return _renamed(name, self.stem)
    rest = _renamed(match[2], self.layer)
    return None if rest is None else self.layers.format(match[1]) + rest


VIT = Layout("encoder.layer.{}.", _VIT_LAYER, _VIT_STEM)
DINOV2 = Layout("encoder.layer.{}.", _DINOV2_LAYER, _VIT_STEM)
DINOV2_GATED = Layout("encoder.layer.{}.", _DINOV2_GATED_LAYER, _VIT_STEM)
DINOV3 = Layout("layer.{}.", _DINOV3_LAYER, _DINOV3_STEM)
DINOV3_GATED = Layout("layer.{}.", _DINOV3_GATED_LAYER, _DINOV3_STEM)
CLIP = Layout("encoder.layers.{}.", _CLIP_LAYER, _CLIP_STEM)

# Modules outside the encoder: the last layers of classifiers.
HEADS = {
  "classifier": "head",
  "cls_classifier": "head",
  "distillation_classifier": "head_dist",
  "visual_projection": "head",
  "layernorm": "norm",  # of BEiT's pre-training
}
# Names in memory since version 5, which appear in the state dict.
_NEWER = {
  "attention.q_proj": "attn.q",
  "attention.k_proj": "attn.k",
  "attention.v_proj": "attn.v",
  "attention.o_proj": "attn.proj",
  _TABLE: "attn.relative_position_bias_table",
  "mlp.gate_proj": "mlp.fc1_g",
  "mlp.down_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)")
_PATCHES = re.compile(
  r"(.*\b|)embeddings\.(patch_embeddings\.projection|patch_embeddings?)\.weight"
)


def _inverse(*tables: Mapping[str, str]) -> dict[str, str]:
  return {theirs: ours for table in tables for ours, theirs in table.items()}


_LAYER_NAMES = _inverse(_VIT_LAYER, _DINOV2_GATED_LAYER, _DINOV2_LAYER, _CLIP_LAYER, _DINOV3_LAYER)
_LAYER_NAMES |= _NEWER
_STEM_NAMES = _inverse(_DINOV3_STEM, _CLIP_STEM, _VIT_STEM)
_STEM_NAMES["shared_position_bias.relative_position_bias_table"] = (
  "rel_pos_bias.relative_position_bias_table"
)


def encoder_prefixes(names: Collection[str]) -> list[str]:
  """Returns the prefix of the names of each image encoder, such as `vit.`."""
  return [match[1] for name in names if (match := _PATCHES.fullmatch(name))]


def timm_name(name: str, is_gated: bool) -> str | None:
  """Returns timm's name for a parameter of an encoder; None if the parameter is unknown.

  Args:
    name: The parameter's name within the encoder.
    is_gated: Whether the MLPs have separate projections for gates and values.
  """
  match = _LAYER.fullmatch(name)
  if match is None:
    return _renamed(name, _STEM_NAMES)
  rest = _renamed(match[2], _LAYER_NAMES)
  if rest is None:
    return None
  if is_gated:
    rest = rest.replace("mlp.fc1.", "mlp.fc1_x.")
  return f"blocks.{match[1]}.{rest}"


def head_name(name: str) -> str | None:
  """Returns timm's name for a parameter outside the encoder; None if the parameter is unknown."""
  return _renamed(name, HEADS)


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
  """Looks up a parameter, or the module that it belongs to."""
  if name in names:
    return names[name]
  module, _, leaf = name.rpartition(".")
  return f"{names[module]}.{leaf}" if module in names else None
