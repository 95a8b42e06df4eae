"""Writes tiny models with rotary positions and their authors' tensor names, for the tests.

    python tools/rotary_author_fixtures.py [NAME ...]

does the same as `author_fixtures.py`, for DINOv3, EVA-02 and Perception Encoder.
"""

from typing import Any

import timm
import torch
from author_fixtures import with_mask
from peer_writing import HEADS, SIZES, Rules, State, authors, drawn, run
from timm.models.eva import Eva


def _dinov3(**options: Any) -> Eva:
  rope = {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100}
  return Eva(
    **SIZES | {"embed_dim": 32},
    num_classes=0,
    **rope,
    rope_rotate_half=True,
    use_abs_pos_emb=False,
    num_reg_tokens=3,
    init_values=0.1,
    global_pool="token",
    norm_layer=lambda *args, **more: timm.layers.LayerNorm(*args, eps=1e-5, **more),
    **options,
  )


def _dinov3_change(state: State) -> State:
  """Concatenates the biases, and adds a key bias that a mask removes."""
  for layer in range(SIZES["depth"]):
    attn = f"blocks.{layer}.attn."
    if f"{attn}q_bias" in state:
      q, v = state.pop(f"{attn}q_bias"), state.pop(f"{attn}v_bias")
      state[f"{attn}qkv.bias"] = torch.cat([q, drawn(*q.shape), v])
      ones = torch.ones_like(q)
      state[f"{attn}qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
  periods = 100 ** (torch.arange(4) / 4)
  return with_mask(state) | {"rope_embed.periods": periods, "local_cls_norm.bias": drawn(32)}


DINOV3: Rules = ((r"^reg_token$", "storage_tokens"), (r"\.gamma_([12])$", r".ls\1.gamma"))


def dinov3() -> None:
  fields = {"image_size": [16, 16]}
  authors("dinov3", _dinov3(), "norm", DINOV3, _dinov3_change, fields, timm_reads=True)


def dinov3_swiglu() -> None:
  """Writes a model like the 7B one: no query bias, SwiGLU with widths in multiples of 64."""
  model = _dinov3(qkv_bias=False, swiglu_mlp=True, swiglu_align_to=8)
  rules = (
    *DINOV3,
    (r"mlp\.fc1_g\.", "mlp.w1."),
    (r"mlp\.fc1_x\.", "mlp.w2."),
    (r"mlp\.fc2\.", "mlp.w3."),
  )
  fields = {"image_size": [16, 16]}
  authors("dinov3_swiglu", model, "norm", rules, _dinov3_change, fields, timm_reads=True)


EVA02: Rules = (
  (r"mlp\.norm\.", "mlp.ffn_ln."),
  (r"attn\.norm\.", "attn.inner_attn_ln."),
  (r"mlp\.fc1_g\.", "mlp.w1."),
  (r"mlp\.fc1_x\.", "mlp.w2."),
  (r"mlp\.fc2\.", "mlp.w3."),
  (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
)


def _with_table(state: State) -> State:
  tables = {f"rope.freqs_{kind}": drawn(16, 8) for kind in ("cos", "sin")}
  return state | tables | {f"blocks.1.attn.{key}": table for key, table in tables.items()}


def _eva02(**options: Any) -> Eva:
  return Eva(
    **SIZES,
    num_classes=5,
    qkv_fused=False,
    swiglu_mlp=True,
    scale_mlp=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(16, 16),
    **options,
  )


def eva02() -> None:
  authors("eva02", _eva02(), "blocks.1", EVA02, _with_table, timm_reads=True)


def eva02_clip() -> None:
  """Writes the image tower of EVA-CLIP, together with a text tower."""

  def change(state: State) -> State:
    text = {"text.ln_final.weight": drawn(8), "logit_scale": drawn(1)[0]}
    return {f"visual.{key}": tensor for key, tensor in _with_table(state).items()} | text

  model = _eva02(scale_attn_inner=True, global_pool="token")
  authors("eva02_clip", model, "norm", EVA02, change, timm_reads=True)


PERCEPTION: Rules = (
  (r"^patch_embed\.proj\.", "conv1."),
  (r"^cls_token$", "class_embedding"),
  (r"^pos_embed$", "positional_embedding"),
  (r"^norm_pre\.", "ln_pre."),
  (r"^norm\.", "ln_post."),
  (r"^blocks\.", "transformer.resblocks."),
  (r"\.norm([12])\.", r".ln_\1."),
  (r"\.gamma_([12])$", r".ls_\1.gamma"),
  (r"\.attn\.qkv\.", ".attn.in_proj_"),
  (r"\.attn\.proj\.", ".attn.out_proj."),
  (r"\.mlp\.fc1\.", ".mlp.c_fc."),
  (r"\.mlp\.fc2\.", ".mlp.c_proj."),
  (r"^attn_pool\.latent$", "attn_pool.probe"),
  (r"^attn_pool\.norm\.", "attn_pool.layernorm."),
  (r"^attn_pool\.proj\.", "attn_pool.attn.out_proj."),
)


def _perception(**options: Any) -> Eva:
  return Eva(
    **SIZES,
    attn_type="rope",
    use_pre_transformer_norm=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(4, 4),
    rope_grid_indexing="xy",
    norm_layer=lambda *args, **more: timm.layers.LayerNorm(*args, eps=1e-5, **more),
    **options,
  )


def _bare_tokens(state: State) -> State:
  for key in {"class_embedding", "positional_embedding"} & state.keys():
    state[key] = state[key].flatten(0, 1)
  if "class_embedding" in state:
    state["class_embedding"] = state["class_embedding"][0]
  return state


def perception_core() -> None:
  model = _perception(
    num_classes=5,
    global_pool="map",
    attn_pool_num_heads=8,
    rope_grid_offset=1.0,
  )

  def change(state: State) -> State:
    state = _bare_tokens(state)
    for kind in ("weight", "bias"):
      parts = [state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
      state[f"attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
    state["proj"] = state.pop("head.weight").T
    text = {"positional_embedding": drawn(4, 8), "transformer.resblocks.0.ln_1.bias": drawn(8)}
    return {f"visual.{key}": tensor for key, tensor in state.items()} | text

  model.head = torch.nn.Linear(16, 5, bias=False)
  authors("perception_core", model, "norm", PERCEPTION, change, HEADS, timm_reads=True)


def perception_spatial() -> None:
  """Writes a model without a CLS token, a final norm or pooling."""
  model = _perception(
    num_classes=0,
    class_token=False,
    global_pool="avg",
    use_post_transformer_norm=False,
    use_fc_norm=False,
    init_values=0.1,
  )
  fields = HEADS | {"pool": "size_mean"}
  authors(
    "perception_spatial", model, "blocks.1", PERCEPTION, _bare_tokens, fields, timm_reads=True
  )


if __name__ == "__main__":
  run(
    (
      dinov3,
      dinov3_swiglu,
      eva02,
      eva02_clip,
      perception_core,
      perception_spatial,
    )
  )
