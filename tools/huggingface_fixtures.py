"""Writes tiny models of Hugging Face transformers for the tests.

    python tools/huggingface_fixtures.py [FOLDER] [NAME ...]

writes `FOLDER/NAME/` (`tests/weights/peers/huggingface` by default). The folder has a model with
random parameters as `save_pretrained` writes it, and `expected.npz` with images, f32[b h w c], and
transformers' outputs for them: `logits` (of a classifier, or the features that this library uses)
and `tokens` (the last hidden state). The script needs PyTorch and transformers.
"""

import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "weights" / "peers" / "huggingface"
SIZES = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "image_size": 16,
  "patch_size": 4,
}
TEXT = {
  "vocab_size": 20,
  "hidden_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 1,
  "intermediate_size": 8,
  "max_position_embeddings": 4,
}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "ox"}, "label2id": {"cat": 0, "dog": 1, "ox": 2}}
DECODER = {
  "decoder_hidden_size": 16,
  "decoder_num_hidden_layers": 1,
  "decoder_num_attention_heads": 1,
  "decoder_intermediate_size": 8,
}

# Class, and changes to its configuration (for towers of CLIP and SigLIP, to `vision_config`).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  "vit": ("ViTModel", {"qkv_bias": False, "layer_norm_eps": 1e-3}),
  "vit_classifier": ("ViTForImageClassification", {**LABELS, "image_size": [12, 20]}),
  "vit_gray": ("ViTForImageClassification", {"num_channels": 1, "hidden_act": "relu"}),
  "vit_features": ("ViTForImageClassification", {"num_labels": 0}),
  "vit_masked": ("ViTForMaskedImageModeling", {"encoder_stride": 4, "image_size": 18}),
  "deit": ("DeiTModel", {}),
  "deit_classifier": ("DeiTForImageClassification", LABELS),
  "deit_teacher": ("DeiTForImageClassificationWithTeacher", LABELS),
  "mae": ("ViTMAEModel", {"mask_ratio": 0.0}),
  "mae_pretraining": ("ViTMAEForPreTraining", {"mask_ratio": 0.0, **DECODER}),
  "dinov2": ("Dinov2Model", {"mlp_ratio": 2}),
  "dinov2_swiglu": ("Dinov2Model", {"use_swiglu_ffn": True, "mlp_ratio": 2}),
  "dinov2_classifier": (
    "Dinov2ForImageClassification",
    {**LABELS, "image_size": 20, "mlp_ratio": 2},
  ),
  "dinov2_registers": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "mlp_ratio": 2}),
  "dinov2_registers_classifier": (
    "Dinov2WithRegistersForImageClassification",
    {**LABELS, "mlp_ratio": 2},
  ),
  "dinov2_no_registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 0, "mlp_ratio": 2}),
  "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 4, "image_size": 24}),
  "dinov3_gated": (
    "DINOv3ViTModel",
    {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "rope_theta": 50.0},
  ),
  "dinov3_key_bias": (
    "DINOv3ViTModel",
    {"key_bias": True, "proj_bias": False, "image_size": [12, 20]},
  ),
  "clip": ("CLIPVisionModel", {}),
  "clip_projection": ("CLIPVisionModelWithProjection", {"projection_dim": 8, "hidden_act": "gelu"}),
  "clip_both": ("CLIPModel", {"projection_dim": 8}),
  "clip_classifier": ("CLIPForImageClassification", LABELS),
  "siglip": ("SiglipVisionModel", {"hidden_act": "gelu"}),
  "siglip_no_head": ("SiglipVisionModel", {"vision_use_head": False}),
  "siglip_both": ("SiglipModel", {}),
  "siglip_classifier": ("SiglipForImageClassification", LABELS),
  "siglip2": ("Siglip2VisionModel", {}),
  "siglip2_classifier": ("Siglip2ForImageClassification", LABELS),
  "ijepa": ("IJepaModel", {}),
  "ijepa_classifier": ("IJepaForImageClassification", LABELS),
  "beit": ("BeitModel", {"use_relative_position_bias": True}),
  "beit_cls": (
    "BeitModel",
    {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
  ),
  "beit_classifier": (
    "BeitForImageClassification",
    {**LABELS, "use_relative_position_bias": True, "image_size": [18, 16]},
  ),
  "beit_absolute": (
    "BeitForImageClassification",
    {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0, "image_size": 24},
  ),
  "beit_masked": (
    "BeitForMaskedImageModeling",
    {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 9},
  ),
  "data2vec": ("Data2VecVisionModel", {"use_shared_relative_position_bias": True}),
  "data2vec_classifier": (
    "Data2VecVisionForImageClassification",
    {**LABELS, "use_relative_position_bias": True},
  ),
}
# Saved with the names of the state dict, which `save_pretrained` changes to those of version 4.
IN_MEMORY = {"deit", "dinov2_registers", "dinov3_gated", "beit", "beit_cls", "mae_pretraining"}
# Classes that output pooled features themselves; for others, the CLS token is used.
POOLED = ("Siglip", "Siglip2", "Beit", "Data2VecVision", "CLIP")


def config_of(
  name: str, changes: dict[str, Any], sizes: dict[str, Any]
) -> transformers.PretrainedConfig:
  """Returns the configuration of a tiny model of a class."""
  kind = getattr(transformers, name).config_class
  if name.startswith("Siglip2"):
    sizes = {key: value for key, value in sizes.items() if key != "image_size"}
    sizes["num_patches"] = 16
  if not hasattr(kind, "sub_configs") or "vision_config" not in kind.sub_configs:
    return kind(**{**sizes, **changes})
  tower = {key: changes[key] for key in ("vision_use_head",) if key in changes}
  rest = {key: value for key, value in changes.items() if key not in tower}
  return kind(vision_config=sizes | tower, text_config=TEXT, **rest)


def randomise(model: torch.nn.Module) -> None:
  """Draws every parameter, including those that are initialized to zero or one."""
  generator = torch.Generator().manual_seed(2)
  for name, parameter in model.named_parameters():
    drawn = torch.randn(parameter.shape, generator=generator) * 0.3
    is_scale = parameter.ndim == 1 and name.endswith(("weight", "lambda1", "lambda_1", "lambda_2"))
    parameter.data = drawn + float(is_scale)


def expected(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
  """Returns transformers' outputs for images."""
  name, grid = type(model).__name__, images.shape[2] // 4
  inputs: dict[str, Any] = {"pixel_values": images}
  if name.startswith("Siglip2"):
    b, c, h, w = images.shape
    patches = images.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
    inputs = {
      "pixel_values": patches.reshape(b, grid * grid, -1),
      "pixel_attention_mask": torch.ones(b, grid * grid, dtype=torch.int32),
      "spatial_shapes": torch.tensor([[grid, grid]] * b),
    }
  if name.startswith("ViTMAE"):  # keeps the patches in order; nothing is masked
    inputs["noise"] = torch.arange(grid * grid, dtype=torch.float32).repeat(len(images), 1)
  towers = {"ForPreTraining": "vit", "ForMaskedImageModeling": model.base_model_prefix}
  encoder = next((getattr(model, at) for end, at in towers.items() if name.endswith(end)), model)
  if name in ("CLIPModel", "SiglipModel"):
    encoder = model.vision_model
  tokens = []
  last = getattr(model, "vision_model", getattr(model, model.base_model_prefix, encoder))
  if name.startswith("DINOv3"):
    last = model
  hook = last.register_forward_hook(lambda module, args, output: tokens.append(output))
  output = encoder(**inputs)
  hook.remove()
  tokens = tokens[0].last_hidden_state
  if name == "CLIPModel":
    logits = model.visual_projection(output.pooler_output)
  elif name == "BeitForMaskedImageModeling":
    tokens = model.layernorm(tokens)
    logits = tokens[:, 0]
  elif (logits := getattr(output, "logits", getattr(output, "image_embeds", None))) is None:
    pooled = getattr(output, "pooler_output", None) if name.startswith(POOLED) else None
    if pooled is None and name.startswith(("IJepa", "Siglip")):
      pooled = tokens.mean(1)
    elif pooled is None and name.startswith(("Beit", "Data2Vec")):
      pooled = tokens[:, 1:].mean(1)
    logits = tokens[:, 0] if pooled is None else pooled
  return {"logits": logits, "tokens": tokens}


def write(folder: pathlib.Path, name: str, sizes: dict[str, Any] | None = None) -> None:
  """Writes one model.

  Args:
    folder: Parent of the model's folder.
    name: A key of `MODELS`.
    sizes: Sizes that override `SIZES`.
  """
  kind, changes = MODELS[name]
  folder = folder / name
  shutil.rmtree(folder, ignore_errors=True)
  config = config_of(kind, changes, SIZES | (sizes or {}))
  model = getattr(transformers, kind)(config).eval()
  randomise(model)
  # This halves the file size; the expected outputs use these values in single precision.
  for parameter in model.parameters():
    parameter.data = parameter.data.half()
  if name in IN_MEMORY:
    config.architectures = [kind]
    config.save_pretrained(folder)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
  else:
    model.save_pretrained(folder)
  for parameter in model.parameters():
    parameter.data = parameter.data.float()
  tower = getattr(config, "vision_config", config)
  size = getattr(tower, "image_size", 16)
  height, width = size if isinstance(size, list | tuple) else (size, size)
  generator = torch.Generator().manual_seed(1)
  images = torch.randint(-8, 9, (2, tower.num_channels, height, width), generator=generator) / 4
  with torch.no_grad():
    arrays = expected(model, images)
  np.savez_compressed(
    folder / "expected.npz",
    images=images.permute(0, 2, 3, 1).numpy(),
    **{key: value.numpy() for key, value in arrays.items()},
  )


def main() -> None:
  is_folder = len(sys.argv) > 1 and sys.argv[1] not in MODELS
  folder = pathlib.Path(sys.argv[1]) if is_folder else FOLDER
  for name in sys.argv[1 + is_folder :] or MODELS:
    write(folder, name)


if __name__ == "__main__":
  main()
