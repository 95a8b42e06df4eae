"""Writes tiny models of OpenCLIP, and of timm's Eva and Beit, for the tests.

    python tools/open_clip_fixtures.py [NAME ...]

rewrites folders below `tests/weights/peers`. Each has a model with random parameters as its library
saves it; `expected.npz` with the library's own outputs for the images that the test draws, `logits`
and `tokens` (after the last norm); and `fields.json` with the fields of the spec that the other
files do not contain. The script needs PyTorch, timm and OpenCLIP.
"""

from typing import Any

import open_clip
import timm
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from peer_writing import Fields, randomise, run, write

TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def open_clip_tower(
  name: str,
  tower: dict[str, Any],
  with_config: bool = True,
  fields: Fields | None = None,
  **options: Any,
) -> None:
  """Writes a full CLIP of OpenCLIP, including the text tower."""
  config = {"embed_dim": 12, "vision_cfg": tower, "text_cfg": TEXT, **options}
  torch.manual_seed(0)
  model = randomise(open_clip.CLIP(**config))
  model.visual.image_mean, model.visual.image_std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
  last = model.visual.ln_post
  if tower.get("final_ln_after_pool"):
    last = model.visual.transformer
  folder = write(name, model.visual, model.state_dict(), fields or {}, last)
  if with_config:
    save_config_for_hf(model, folder / "open_clip_config.json", config)


OWN = {
  "layers": 2,
  "mlp_ratio": 2.5,
  "width": 16,
  "head_width": 8,
  "patch_size": 4,
  "image_size": 16,
}


def open_clip_quickgelu() -> None:
  open_clip_tower("open_clip/quickgelu", OWN, quick_gelu=True)


def open_clip_clipa() -> None:
  pooled = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
  tower = OWN | pooled | {"mlp_ratio": 3.5, "ls_init_value": 0.1, "norm_kwargs": {"eps": 1e-4}}
  open_clip_tower("open_clip/clipa", tower)


def open_clip_no_config() -> None:
  """Writes a bare state dict; the user has to specify what the tensors do not contain."""
  fields = {"activation": "gelu", "num_heads": 2, "norm_eps": 1e-5, "pool": "cls"}
  open_clip_tower("open_clip/no_config", OWN, with_config=False, fields=fields)


TIMM: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
TIMM |= {"depth": 2, "mlp_ratio": 2.5}
TOLD = {"num_heads": 2, "norm_eps": 1e-6, "activation": "gelu"}


@timm.models.register_model
def vit_little_tower(pretrained: bool = False, **options: Any) -> torch.nn.Module:
  """Returns a tower that OpenCLIP can create by its name in timm."""
  make = timm.models.vision_transformer._create_vision_transformer
  return make("test_vit", pretrained=pretrained, **TIMM | options)


def open_clip_timm() -> None:
  tower = {"timm_model_name": "vit_little_tower", "timm_pool": "token", "timm_proj": "linear"}
  config = {"embed_dim": 12, "vision_cfg": tower | {"image_size": 16}, "text_cfg": TEXT}
  model = randomise(open_clip.CustomTextCLIP(**config))
  model.visual.image_mean, model.visual.image_std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
  last = model.visual.trunk.norm
  fields = {"num_heads": 2, "image_size": [16, 16]}
  folder = write("open_clip/timm", model.visual, model.state_dict(), fields, last)
  # The name of a timm model with other sizes.
  tower["timm_model_name"] = "vit_tiny_patch16_224"
  config["vision_cfg"] = tower
  save_config_for_hf(model, folder / "open_clip_config.json", config)


def timm_class(name: str, kind: type, last: str, fields: Fields, **options: Any) -> None:
  """Writes a model of one of timm's classes with timm's names."""
  model = randomise(kind(**TIMM | {"num_classes": 5} | options))
  write(name, model, model.state_dict(), TOLD | fields, model.get_submodule(last))


def timm_eva02() -> None:
  """Writes a model like EVA-02 CLIP: no key bias, SwiGLU, inner norms, rotary positions."""
  rotary = {"kind": "index", "reference": [3, 3]}
  timm_class(
    "timm/eva02",
    timm.models.eva.Eva,
    "norm",
    {"rotary": rotary, "pool": "cls", "activation": "silu"},
    **{"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    **{"use_rot_pos_emb": True, "ref_feat_shape": (3, 3), "global_pool": "token"},
  )


def timm_eva_fused() -> None:
  """Writes a model like EVA: the mean of patches, followed by a norm."""
  timm_class("timm/eva_fused", timm.models.eva.Eva, "blocks.1", {"pool": "size_mean"})


def timm_eva_rope() -> None:
  """Writes a ViT with mixed rotary positions, query, key and value biases, and layer scales."""
  timm_class(
    "timm/eva_rope",
    timm.models.eva.Eva,
    "norm",
    {"rotary": {"kind": "mixed"}, "pool": "cls", "image_size": [16, 16]},
    **{"attn_type": "rope", "use_rot_pos_emb": True, "rope_type": "mixed", "init_values": 0.1},
    **{"qkv_fused": False, "use_abs_pos_emb": False, "global_pool": "token", "use_fc_norm": False},
  )


def timm_beit() -> None:
  timm_class(
    "timm/beit",
    timm.models.beit.Beit,
    "blocks.1",
    {"pool": "size_mean"},
    **{"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1},
  )


def timm_beit_shared() -> None:
  timm_class(
    "timm/beit_shared",
    timm.models.beit.Beit,
    "norm",
    {"pool": "cls"},
    **{"use_shared_rel_pos_bias": True, "global_pool": "token", "init_values": 0.1},
  )


if __name__ == "__main__":
  run(
    (
      open_clip_quickgelu,
      open_clip_clipa,
      open_clip_no_config,
      open_clip_timm,
      timm_eva02,
      timm_eva_fused,
      timm_eva_rope,
      timm_beit,
      timm_beit_shared,
    )
  )
