"""Writes tiny timm models for the tests, one for each structure in timm's table.

    python -m tools.timm_fixtures [NAME ...]

rewrites `tests/weights/peers/timm_families/NAME/`. Each folder has a model with random parameters
in half precision, as `timm.models.save_for_hf` writes it, and `expected.npz` with images,
f32[b h w c], and timm's outputs for them in single precision: `logits` and `tokens` (from
`forward_features`). The script needs timm and PyTorch, unlike the library.
"""

import argparse
import copy
import pathlib
import shutil
import warnings
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from tools import timm_table

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "weights" / "peers" / "timm_families"
SIZES = {
  "img_size": (16, 12),
  "patch_size": 4,
  "embed_dim": 16,
  "depth": 2,
  "num_heads": 2,
  "mlp_ratio": 2.0,
}


def small(name: str, sizes: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
  """Returns a timm model with small sizes, and draws every parameter.

  Args:
    name: The model's name.
    sizes: Arguments of timm's model.
    seed: Seed of the parameters.
  """
  arguments = SIZES | {"num_classes": 7} | (sizes or {})
  if "_pe_core_" in name:
    arguments["attn_pool_num_heads"] = 2 * arguments["num_heads"]
  if name.startswith("deit3_"):
    arguments["init_values"] = 1e-6
  model = timm.create_model(name, **arguments).eval()
  generator = torch.Generator().manual_seed(seed)
  # Attention is far from uniform, and activations stay small enough for single precision.
  scale = 0.8 / model.embed_dim**0.5
  for parameter_name, parameter in model.named_parameters():
    # Scales and layer scales are drawn around one, all other parameters around zero.
    is_scale = parameter.ndim == 1 and parameter_name.endswith("weight")
    centre = float(is_scale or "gamma" in parameter_name)
    drawn = torch.randn(parameter.shape, generator=generator)
    parameter.data = centre + drawn * (0.3 if parameter.ndim == 1 else scale)
  return model


def images_for(model: nn.Module, count: int = 1) -> torch.Tensor:
  """Draws images of the size that a model expects."""
  embed, generator = model.patch_embed, torch.Generator().manual_seed(1)
  return torch.randn((count, embed.proj.in_channels, *embed.img_size), generator=generator)


def expected(model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
  """Returns images, and timm's logits and last tokens for them."""
  with torch.no_grad():
    arrays = {"logits": model(images), "tokens": model.forward_features(images)}
  arrays["images"] = images.permute(0, 2, 3, 1)
  return {key: value.numpy() for key, value in arrays.items()}


def save(model: nn.Module, folder: pathlib.Path) -> None:
  with warnings.catch_warnings(action="ignore"):
    timm.models.save_for_hf(model, folder, safe_serialization=True)


def write(name: str) -> None:
  """Writes one model."""
  shutil.rmtree(FOLDER / name, ignore_errors=True)
  model = small(name)
  for parameter in model.parameters():
    parameter.data = parameter.data.half().float()
  # A copy, because `half` also converts buffers, such as the angles of rotary positions.
  save(copy.deepcopy(model).half(), FOLDER / name)
  np.savez_compressed(FOLDER / name / "expected.npz", **expected(model, images_for(model)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help="one of each structure by default")
  models, _ = timm_table.bundled()
  first = [names[0] for names in timm_table.structures(models["models"])]
  for name in parser.parse_args().names or first:
    write(name)


if __name__ == "__main__":
  main()
