"""BEiT under Microsoft's names, and its descendants EVA and EVA-02 under BAAI's.

Bao et al., `BEiT <https://arxiv.org/abs/2106.08254>`_, 2021;
Fang et al., `EVA <https://arxiv.org/abs/2211.07636>`_, 2022;
Fang et al., `EVA-02 <https://arxiv.org/abs/2303.11331>`_, 2023.
"""

from collections.abc import Collection, Mapping

from vitcomp_jax.weights.dialects import timm_eva
from vitcomp_jax.weights.dialects.family import Family, Fields
from vitcomp_jax.weights.dialects.open_clip import image_tower, tower_names
from vitcomp_jax.weights.dialects.renaming import has
from vitcomp_jax.weights.tensors import State

# Parts used only in pre-training: the mask token, the prediction of visual words, and BEiT v2's
# layers on top of the CLS token; and buffers, which the image size determines.
_UNUSED = (
  r"mask_token",
  r"(lm_head|cls_pt_layers)\..*",
  r".*\.relative_position_index",
  r"(.*\.)?rope\.freqs_(cos|sin)",
)
_TABLE = r"(.*\.)?rope\.freqs_cos"
_PRETRAINING = ("mask_token", "lm_head.weight")


def _pool(tensors: State) -> Fields:
  """Returns the pooling: the mean if there is `fc_norm`, or else CLS if there is a classifier."""
  if "fc_norm.weight" in tensors:
    return {"pool": "size_mean"}
  return {"pool": "cls"} if "head.weight" in tensors else {}


def _beit_fields(tensors: State, shapes: Mapping[str, object]) -> Fields:
  return {"norm_eps": 1e-6, "activation": "gelu"} | _pool(tensors)


def _eva02_fields(tensors: State, shapes: Mapping[str, object]) -> Fields:
  """Returns the fields that EVA-02's code fixes; the table of rotations gives the head size."""
  table = next(name for name in tensors if has([name], _TABLE))
  width = shapes.get("width")
  fields: Fields = {
    "norm_eps": 1e-6,
    "activation": "gelu" if shapes.get("mlp") == "mlp" else "silu",
    # Positions are rescaled to the 16 x 16 grid of patches used in pre-training.
    "rotary": {"kind": "index", "reference": (16, 16)},
  }
  if isinstance(width, int):
    fields["num_heads"] = width // tensors[table].shape[-1]
  return fields | _pool(tensors)


def _is_in_pretraining(names: Collection[str]) -> bool:
  """Returns whether layers are EVA's or BEiT's and parts of pre-training are present."""
  return timm_eva.recognises(names) and not set(_PRETRAINING).isdisjoint(names)


def _is_eva02(names: Collection[str]) -> bool:
  return "cls_token" in tower_names(names) and has(names, _TABLE)


def _is_beit(names: Collection[str]) -> bool:
  return "cls_token" in names and has(names, r".*\.relative_position_index")


EVA02 = Family(
  "EVA-02",
  _is_eva02,
  select=image_tower,
  dropped=_UNUSED,
  patterns=(
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
  ),
  finish=timm_eva.to_timm,
  fields=_eva02_fields,
)
BEIT = Family(
  "BEiT",
  _is_beit,
  dropped=_UNUSED,
  finish=timm_eva.to_timm,
  fields=_beit_fields,
)
# Without a relative position bias, the names do not tell EVA and BEiT apart.
PRETRAINING = Family(
  "EVA or BEiT in pre-training", _is_in_pretraining, dropped=_UNUSED, finish=timm_eva.to_timm
)
