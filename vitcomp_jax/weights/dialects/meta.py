"""Files of facebookresearch: DINO, MoCo v3, MAE, I-JEPA, DINOv2 and DINOv3.

If a file is recognisably from one of these, the authors' code determines what the tensors do not.
Plain files of DINO, DeiT or MAE's encoder have timm's names and are not recognisable.
"""

from collections.abc import Collection, Mapping

import numpy as np

from vitcomp_jax.errors import UserError
from vitcomp_jax.weights.dialects.family import Family, Fields, heads_by_width
from vitcomp_jax.weights.dialects.renaming import Array, changed, has, thirds
from vitcomp_jax.weights.tensors import State

_SWIGLU = (
  (r"\.mlp\.w12\.", ".mlp.fc1."),
  (r"\.mlp\.w1\.", ".mlp.fc1_g."),
  (r"\.mlp\.w2\.", ".mlp.fc1_x."),
  (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_BACKBONE = ((r"^backbone\.", ""),)
_PROJECTIONS = (r"(dino_head|ibot_head|koleo)\..*", r"head\.(mlp|last_layer)\..*")


def activation(shapes: Mapping[str, object]) -> str:
  """Returns the activation of all these models: GELU, or SiLU with gates."""
  return "gelu" if shapes.get("mlp") == "mlp" else "silu"


def _self_supervised(heads: Mapping[int, int], shapes: Mapping[str, object]) -> Fields:
  """Returns the fields that ViTs trained without labels share."""
  fields = {"norm_eps": 1e-6, "activation": activation(shapes), "pool": "cls"}
  return fields | heads_by_width(heads, shapes)


# Caron et al., `DINO <https://arxiv.org/abs/2104.14294>`_, 2021. A training checkpoint.
def _is_dino(names: Collection[str]) -> bool:
  return "backbone.cls_token" in names and has(names, r"head\.last_layer\.weight\w*")


_DINO = Family(
  "DINO",
  _is_dino,
  dropped=_PROJECTIONS,
  patterns=_BACKBONE,
  fields=lambda tensors, shapes: _self_supervised({192: 3, 384: 6, 768: 12}, shapes),
)


# Chen et al., `MoCo v3 <https://arxiv.org/abs/2104.02057>`_, 2021. Its small model has 12 heads.
def _is_moco(names: Collection[str]) -> bool:
  return {"base_encoder.cls_token", "momentum_encoder.cls_token"} <= set(names)


def _check_stem(state: dict[str, Array]) -> dict[str, Array]:
  if "patch_embed.proj.0.weight" in state:
    raise UserError(
      "weights: expected patches embedded by one convolution, got a convolutional stem "
      "(patch_embed.proj.0.weight), which is not supported; give weights of another model."
    )
  return state


_MOCO = Family(
  "MoCo v3",
  _is_moco,
  dropped=(r"momentum_encoder\..*", r"predictor\..*", r"base_encoder\.head\.\d.*", r"queue.*"),
  patterns=((r"^base_encoder\.", ""),),
  finish=_check_stem,
  fields=lambda tensors, shapes: _self_supervised({384: 12, 768: 12}, shapes),
)

# He et al., `MAE <https://arxiv.org/abs/2111.06377>`_, 2021. A decoder identifies a pre-training
# file; the features of a frozen encoder are the CLS token, as in the authors' linear probing.
_MAE = Family(
  "MAE",
  lambda names: {"mask_token", "decoder_embed.weight", "decoder_pos_embed"} <= set(names),
  dropped=(r"mask_token", r"decoder_.*"),
  fields=lambda tensors, shapes: _self_supervised({768: 12, 1024: 16, 1280: 16}, shapes),
)


# Assran et al., `I-JEPA <https://arxiv.org/abs/2301.08243>`_, 2023. The averaged encoder, whose
# features are the mean of all patches.
_I_JEPA = Family(
  "I-JEPA",
  lambda names: has(names, r"target_encoder\.(module\.)?patch_embed\.proj\.weight"),
  patterns=((r"^target_encoder\.(module\.)?", ""),),
  fields=lambda tensors, shapes: (
    _self_supervised({192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}, shapes)
    | {"pool": "size_mean"}
  ),
)


# Oquab et al., `DINOv2 <https://arxiv.org/abs/2304.07193>`_, 2023. Names are timm's, except for the
# mask token, registers and SwiGLU. In training, layers are in chunks but keep their numbers.
def _is_dinov2(names: Collection[str]) -> bool:
  has_scales = has(names, r"(backbone\.)?blocks\.(\d+\.)?\d+\.ls1\.gamma")
  has_mask = not {"mask_token", "backbone.mask_token"}.isdisjoint(names)
  return has_mask and has_scales and not _is_dinov3(names)


def _finish_dinov2(state: dict[str, Array]) -> dict[str, Array]:
  """Adds its position to the CLS token if there are registers, which have no positions."""
  if {"reg_token", "cls_token", "pos_embed"} <= state.keys():
    token, positions = state["cls_token"], state["pos_embed"]
    state["cls_token"] = np.asarray(token) + np.asarray(positions)[:, :1]
    count, width = positions.shape[1] - 1, positions.shape[2]
    state["pos_embed"] = changed(positions, lambda array: array[:, 1:], (1, count, width))
  head, norm = state.get("head.weight"), state.get("norm.weight")
  if head is not None and norm is not None and head.shape[1] > 2 * norm.shape[0]:
    raise UserError(
      f"weights: expected a linear head that reads CLS token and mean of the last layer, "
      f"{2 * norm.shape[0]} features, got {head.shape[1]} features, of several layers; give a head "
      "of one layer, or none."
    )
  return state


def _dinov2_fields(tensors: State, shapes: Mapping[str, object]) -> Fields:
  fields = _self_supervised({384: 6, 768: 12, 1024: 16, 1536: 24}, shapes)
  if "linear_head.weight" in tensors:
    fields["pool"] = "cls_mean"
  has_registers = bool(shapes.get("num_registers"))
  return fields | {"antialias": has_registers, "pos_on_prefix": not has_registers}


_DINOV2 = Family(
  "DINOv2",
  _is_dinov2,
  dropped=(r"(backbone\.)?mask_token", *_PROJECTIONS),
  patterns=(
    *_BACKBONE,
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^register_tokens$", "reg_token"),
    (r"^linear_head\.", "head."),
    *_SWIGLU,
  ),
  finish=_finish_dinov2,
  fields=_dinov2_fields,
)


# Siméoni et al., `DINOv3 <https://arxiv.org/abs/2508.10104>`_, 2025.
def _is_dinov3(names: Collection[str]) -> bool:
  return {"storage_tokens", "rope_embed.periods"} <= set(names)


def _split_biases(state: dict[str, Array]) -> dict[str, Array]:
  """Drops the bias of keys, which is masked."""
  for name in [name for name in state if name.endswith(".attn.qkv.bias_mask")]:
    del state[name]
    bias = name.removesuffix("_mask")
    attn = bias.removesuffix("qkv.bias")
    state[f"{attn}q_bias"], _, state[f"{attn}v_bias"] = thirds(state.pop(bias))
  return state


def _dinov3_fields(tensors: State, shapes: Mapping[str, object]) -> Fields:
  """Returns what DINOv3's code fixes; the stored periods give the head size and temperature."""
  periods = np.asarray(tensors["rope_embed.periods"], np.float64)
  count = len(periods)
  width = shapes.get("width")
  fields: Fields = {
    "norm_eps": 1e-5,
    "activation": activation(shapes),
    "pool": "cls",
    "image_size": (224, 224),
  }
  if isinstance(width, int):
    fields["num_heads"] = width // (4 * count)
  if count > 1:
    # The last period is the temperature to the power 1 - 1/count; half precision rounds it.
    temperature = float(f"{periods[-1] ** (count / (count - 1)):.2g}")
    fields["rotary"] = {"kind": "centred", "temperature": temperature, "halves": True}
  return fields


_DINOV3 = Family(
  "DINOv3",
  lambda names: _is_dinov3(names) and not has(names, r"blocks\.\d+\.attn\.wq\..*"),
  dropped=(r"mask_token", r"rope_embed\.periods", r"local_cls_norm\..*", r"projectors\..*"),
  patterns=((r"^storage_tokens$", "reg_token"), *_SWIGLU),
  finish=_split_biases,
  fields=_dinov3_fields,
)

FAMILIES = (_DINO, _MOCO, _MAE, _I_JEPA, _DINOV3, _DINOV2)
