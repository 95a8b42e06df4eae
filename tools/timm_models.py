"""Writes the tables of timm's models and of the preprocessing of their weights.

    python -m tools.timm_models

rewrites two files in `vitcomp_jax/bundled`. `timm_models.json` has the spec and the number of
parameters of every timm Vision Transformer that this library can represent, and for every other
one the reason why it cannot. `timm_tags.json` has the image preprocessing and number of classes of
each pre-training tag. With `--docs`, the script writes nothing, and prints the tables of
`docs/models.md` for the installed version of timm. It needs timm and PyTorch, unlike the library.
"""

import argparse
import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, list_pretrained
from timm.models._registry import _model_to_module
from torch import nn

from tools import timm_table
from vitcomp_jax.models.rotary import Rotary
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.variants import VARIANTS

# timm's modules with plain Vision Transformers.
MODULES = ("beit", "deit", "eva", "vision_transformer")
ACTIVATIONS = {
  "GELU": "gelu",
  "GELUTanh": "gelu_tanh",
  "QuickGELU": "quick_gelu",
  "ReLU": "relu",
  "SiLU": "silu",
}
MLPS = {"Mlp": "mlp", "GluMlp": "glu", "SwiGLU": "swiglu"}
ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")
BLOCKS = ("Block", "EvaBlock", "EvaBlockPostNorm", "ResPostBlock")
POOLS = {"token": "cls", "avg": "size_mean", "map": "map"}
NORMS = {"LayerNorm": "layer", "RmsNorm": "rms"}


class Unrepresented(Exception):
  """Says which part of a model this library does not support."""


def fields_of(model: nn.Module) -> dict[str, Any]:
  """Returns the fields of a `ViTSpec` for a timm model.

  Raises:
    Unrepresented: If no spec can represent the model.
  """
  block = model.blocks[0]
  if type(block).__name__ not in BLOCKS:
    raise Unrepresented(f"layers of the class {type(block).__name__}")
  attn, mlp = block.attn, block.mlp
  if type(attn).__name__ not in ATTENTIONS:
    raise Unrepresented(f"attention of the class {type(attn).__name__}")
  heads = {
    (b.attn.num_heads, getattr(b.attn, "num_kv_heads", b.attn.num_heads)) for b in model.blocks
  }
  if len(heads) > 1 or any(q != kv for q, kv in heads):
    raise Unrepresented("grouped-query attention")
  if hasattr(block, "gamma_1") and block.gamma_1 is not None and block.gamma_2 is None:
    raise Unrepresented("layer scale of attention alone")
  if model.global_pool not in POOLS:
    raise Unrepresented(f"pooling {model.global_pool!r}")
  embed, distilled = model.patch_embed, hasattr(model, "dist_token")
  is_packed = type(mlp).__name__ == "GluMlp"
  if is_packed and mlp.gate_last:
    raise Unrepresented("an MLP whose gates come last")
  hidden = mlp.fc2.in_features
  registers = 0 if getattr(model, "reg_token", None) is None else model.reg_token.shape[1]
  has_positions = getattr(model, "pos_embed", None) is not None
  pool = model.attn_pool if getattr(model, "attn_pool", None) is not None else None
  norm = block.norm1
  fields = {
    "image_size": tuple(embed.img_size),
    "patch_size": embed.patch_size[0],
    "width": model.embed_dim,
    "depth": len(model.blocks),
    "num_heads": attn.num_heads,
    "mlp_dim": hidden,
    "in_chans": embed.proj.in_channels,
    "num_classes": model.num_classes,
    "class_token": model.cls_token is not None,
    "distilled": distilled,
    "num_registers": registers,
    "pos_on_prefix": not getattr(model, "no_embed_class", False),
    "positions": "absolute" if has_positions else "none",
    "rotary": rotary_of(model),
    "relative_bias": relative_bias_of(model),
    "pool": "cls_dist" if distilled else POOLS[model.global_pool],
    "pool_prefix": getattr(model, "pool_include_prefix", pool is not None),
    "pool_heads": None if pool is None else pool.num_heads,
    "pool_mlp_dim": None if pool is None else pool.mlp.fc2.in_features,
    "norm_pre": is_there(getattr(model, "norm_pre", None)),
    "final_norm": is_there(model.norm),
    "fc_norm": is_there(model.fc_norm),
    "norm": NORMS[type(norm).__name__],
    "norm_eps": norm.eps,
    "norm_after": type(block).__name__ in ("EvaBlockPostNorm", "ResPostBlock"),
    "patch_bias": embed.proj.bias is not None,
    "patch_norm": is_there(embed.norm),
    "linear_bias": attn.proj.bias is not None,
    "qkv_bias": qkv_bias_of(attn),
    "qk_norm": is_there(getattr(attn, "q_norm", None)),
    "attn_norm": is_there(getattr(attn, "norm", None)),
    "mlp": MLPS[type(mlp).__name__],
    "mlp_norm": is_there(mlp.norm),
    "activation": ACTIVATIONS[type(mlp.act).__name__],
    "layer_scale": getattr(block, "gamma_1", None) is not None
    or is_there(getattr(block, "ls1", None)),
  }
  if fields["pool_heads"] == fields["num_heads"]:
    fields["pool_heads"] = None
  if fields["pool_mlp_dim"] == fields["mlp_dim"]:
    fields["pool_mlp_dim"] = None
  return fields


def is_there(norm: nn.Module | None) -> bool:
  return norm is not None and not isinstance(norm, nn.Identity)


def qkv_bias_of(attn: nn.Module) -> str:
  if getattr(attn, "q_bias", None) is not None:
    return "qv"
  if getattr(attn, "qkv", None) is not None:
    return "qkv" if attn.qkv.bias is not None else ""
  biases = [part.bias is not None for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
  return {(True, True, True): "qkv", (True, False, True): "qv", (False,) * 3: ""}[tuple(biases)]


def relative_bias_of(model: nn.Module) -> str | None:
  if getattr(model, "rel_pos_bias", None) is not None:
    return "shared"
  has_table = getattr(model.blocks[0].attn, "relative_position_bias_table", None) is not None
  return "layer" if has_table else None


def rotary_of(model: nn.Module) -> dict[str, Any] | None:
  """Returns the fields of a `Rotary` that differ from its defaults; None without one."""
  rope = getattr(model, "rope", None)
  if rope is None:
    return None
  kind = {"Cat": "index", "DinoV3": "centred", "Mixed": "mixed"}
  rotary = Rotary(
    kind=kind[type(rope).__name__.removeprefix("RotaryEmbedding")],
    temperature=float(rope.temperature),
    reference=None if getattr(rope, "ref_feat_shape", None) is None else tuple(rope.ref_feat_shape),
    offset=float(getattr(rope, "grid_offset", 0.0)),
    columns_first=rope.grid_indexing == "xy",
    halves=bool(getattr(rope, "rotate_half", False)),
  )
  return changed(rotary)


def changed(value: Any) -> dict[str, Any]:
  """Returns the fields of a dataclass that differ from their defaults."""
  fields = dataclasses.fields(value)
  return {f.name: getattr(value, f.name) for f in fields if getattr(value, f.name) != f.default}


def models() -> dict[str, dict[str, Any]]:
  """Returns the content of `timm_models.json` without timm's version."""
  known: dict[str, dict[str, Any]] = {}
  refused: dict[str, str] = {}
  parameters: dict[str, int] = {}
  for name in timm.list_models():
    if _model_to_module[name] not in MODULES:
      continue
    with torch.device("meta"):
      model = timm.create_model(name)
    try:
      fields = fields_of(model)
    except Unrepresented as why:
      refused[name] = str(why)
      continue
    defaults = {f.name: f.default for f in dataclasses.fields(ViTSpec)}
    fields |= {"naming": naming_of(model), "antialias": not is_resampled_plainly(name)}
    fields |= image_fields(model.pretrained_cfg)
    known[name] = {k: v for k, v in fields.items() if k not in defaults or v != defaults[k]}
    parameters[name] = sum(parameter.numel() for parameter in model.parameters())
  return {"models": known, "parameters": parameters, "refused": refused, "others": others()}


def others() -> dict[str, list[int]]:
  """Returns the number of models and tags in each timm module with other kinds of models."""
  names = Counter(_model_to_module[name] for name in timm.list_models())
  tagged = Counter(_model_to_module[name.split(".")[0]] for name in list_pretrained())
  return {module: [names[module], tagged[module]] for module in timm_table.OTHERS}


def naming_of(model: nn.Module) -> str:
  name = {"Beit": "beit", "Eva": "eva"}.get(type(model).__name__, "vit")
  is_split = getattr(model.blocks[0].attn, "qkv", None) is None
  return f"{name}_split" if is_split else name


def is_resampled_plainly(name: str) -> bool:
  """Returns whether positions are resampled to another grid without antialiasing."""
  # As DINOv2's authors do, unlike timm.
  return "dinov2" in name


def image_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "mean": tuple(config["mean"]),
    "std": tuple(config["std"]),
    "crop_pct": config["crop_pct"],
    "crop_mode": config.get("crop_mode") or "center",
    "interpolation": config["interpolation"],
  }


def tags(known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns preprocessing and number of classes for each pre-training tag of known models."""
  by_hand = {name for name in VARIANTS if name.startswith("caformer")}
  names = [name for name in list_pretrained() if name.split(".")[0] in known.keys() | by_hand]
  return {name: tag(name) for name in names}


def tag(name: str) -> dict[str, Any]:
  """Returns the preprocessing and number of classes of a pre-training tag."""
  config = get_pretrained_cfg(name)
  return {
    "mean": list(config.mean),
    "std": list(config.std),
    "crop_pct": config.crop_pct,
    "crop_mode": config.crop_mode,
    "interpolation": config.interpolation,
    "image_size": list(config.input_size[1:]),
    "num_classes": config.num_classes,
  }


def write(path: pathlib.Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes a table with one entry per line."""
  text = [f'"timm": "{timm.__version__}"']
  for part, entries in parts.items():
    lines = ",\n".join(
      f'  "{name}": {json.dumps(entry)}' for name, entry in sorted(entries.items())
    )
    text.append(f'"{part}": {{\n{lines}\n}}')
  path.write_text("{\n" + ",\n".join(text) + "\n}\n")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--docs", action="store_true", help="print the tables of docs/models.md")
  is_asked = parser.parse_args().docs
  table = models()
  tagged = tags(table["models"])
  if is_asked:
    print(timm_table.markdown({"timm": timm.__version__, **table}, tagged), end="")
    return
  write(timm_table.BUNDLED / "timm_models.json", table)
  write(timm_table.BUNDLED / "timm_tags.json", {"tags": tagged})


if __name__ == "__main__":
  main()
