"""Perception Encoder under the names of facebookresearch/perception_models.

Bolya et al., `Perception Encoder <https://arxiv.org/abs/2504.13181>`_, 2025.
"""

from collections.abc import Collection, Mapping

from vitcomp_jax.weights.dialects.family import Family, Fields, heads_by_width
from vitcomp_jax.weights.dialects.open_clip import PATTERNS, image_tower, tower_names, with_axes
from vitcomp_jax.weights.dialects.renaming import Array, rows
from vitcomp_jax.weights.tensors import State

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 16}


def is_perception_encoder(names: Collection[str]) -> bool:
  """Returns whether names are those of a tower that pools by a probe or has no last norm."""
  inside = tower_names(names)
  is_tower = {"conv1.weight", "ln_pre.weight", "transformer.resblocks.0.ln_1.weight"} <= inside
  return is_tower and ("attn_pool.probe" in inside or "ln_post.weight" not in inside)


def _finish(state: dict[str, Array]) -> dict[str, Array]:
  """Splits the query of the pooling head from keys and values."""
  for kind in ("weight", "bias"):
    if (fused := state.pop(f"attn_pool.qkv.{kind}", None)) is not None:
      size = fused.shape[0] // 3
      state[f"attn_pool.q.{kind}"] = rows(fused, 0, size)
      state[f"attn_pool.kv.{kind}"] = rows(fused, size, 3 * size)
  return with_axes(state)


def _fields(tensors: State, shapes: Mapping[str, object]) -> Fields:
  fields: Fields = {
    "norm_eps": 1e-5,
    "activation": "gelu",
    # Rotations count from one if there is a CLS token, which takes position zero.
    "rotary": {
      "kind": "index",
      "columns_first": True,
      "offset": float(bool(shapes.get("class_token"))),
    },
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_mode": "squash",
    "crop_pct": 1.0,
  }
  if shapes.get("pool") == "map":
    fields |= {"pool": "map", "pool_prefix": True, "pool_heads": 8}
  return fields | heads_by_width(_HEADS, shapes)


PERCEPTION_ENCODER = Family(
  "Perception Encoder",
  is_perception_encoder,
  select=image_tower,
  patterns=(
    *PATTERNS,
    (r"^ln_post\.", "norm."),
    (r"^attn_pool\.probe$", "attn_pool.latent"),
    (r"^attn_pool\.layernorm\.", "attn_pool.norm."),
    (r"^attn_pool\.attn\.", "attn_pool."),
  ),
  finish=_finish,
  fields=_fields,
)
