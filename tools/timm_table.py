"""Prints the table of timm's models in `docs/models.md`, and groups the models by structure.

    python -m tools.timm_table

reads `vitcomp_jax/bundled/timm_models.json` and `timm_tags.json`, which `tools/timm_models.py`
writes. It needs neither timm nor PyTorch.
"""

import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

BUNDLED = pathlib.Path(__file__).parents[1] / "vitcomp_jax" / "bundled"
Models = Mapping[str, Mapping[str, Any]]

# Families, with the pattern of their names; the first match counts.
FAMILIES = {
  "AIMv2": r"aimv2_",
  "BEiT, BEiT v2": r"beit(v2)?_",
  "BEiT-3": r"beit3_",
  "CAFormer": r"caformer_",
  "CLIP, OpenCLIP": r"vit_.*_clip_",
  "DeiT": r"deit_",
  "DeiT-III": r"deit3_",
  "DINOv2": r".*_dinov2",
  "DINOv3": r".*_dinov3",
  "EVA": r"eva_",
  "EVA-02": r"eva02_",
  "FlexiViT": r"flexivit_",
  "InternViT": r"vit_intern",
  "LingBot": r".*_lingbot",
  "Perception Encoder": r"vit_pe_",
  "RADIO": r".*_radio_",
  "Rotary ViT": r".*_rope_",
  "SigLIP, SigLIP 2": r".*_siglip_",
  "TIPS v2": r".*_tipsv2",
  "timm's tests": r"test_",
  "ViT with registers or a mean of patches": r".*_(reg\d|gap|map)_",
  "ViT (AugReg, MAE, DINO, ...)": r"vit_",
}
# timm modules whose models are called Vision Transformers, and what distinguishes them from a plain
# one.
OTHERS = {
  "cait": "layers in which CLS alone attends",
  "coat": "convolutions between stages",
  "convit": "attention gated by position",
  "crossvit": "two sequences of tokens",
  "davit": "attention among channels, windows",
  "deepseek_vit": "an encoder in a class of its own",
  "efficientformer": "convolutional stages",
  "efficientformer_v2": "convolutional stages",
  "efficientvit_mit": "linear attention, convolutions",
  "efficientvit_msra": "convolutions, attention in groups",
  "fastvit": "convolutional stages",
  "gcvit": "windows",
  "gemma4_vit": "four norms in a layer, a pooler on the grid",
  "hiera": "windows, pooled stages",
  "hieradet_sam2": "windows, pooled stages",
  "levit": "convolutional stem, stages",
  "maxxvit": "windows, convolutions",
  "mobilevit": "convolutional stages",
  "mvitv2": "pooled queries and keys",
  "naflexvit": "patches of images of any shape in one sequence",
  "nest": "windows, convolutions between stages",
  "nextvit": "convolutional stages",
  "pit": "convolutions between stages",
  "pvt_v2": "pooled keys, convolutions",
  "qwen3_vit": "an encoder in a class of its own",
  "repvit": "convolutions alone",
  "shvit": "convolutional stages, one head",
  "swin_transformer": "windows",
  "swin_transformer_v2": "windows",
  "swin_transformer_v2_cr": "windows",
  "tiny_vit": "windows, convolutional stages",
  "tnt": "a second sequence inside each patch",
  "twins": "windows",
  "visformer": "convolutional stages",
  "vision_transformer_hybrid": "convolutional stem",
  "vision_transformer_relpos": "relative positions of other kinds",
  "vision_transformer_sam": "windows, decomposed relative positions",
  "vitamin": "convolutional stages",
  "volo": "outlook attention, class attention",
  "xcit": "attention among channels",
}
# Fields that change only sizes, images and classes, but not how the model computes.
_SIZES = frozenset(
  """antialias crop_mode crop_pct depth image_size interpolation mean mlp_dim num_classes num_heads
  patch_size pool_mlp_dim std width""".split()
)


def bundled() -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the tables of models and of tags that ship with the library."""
  models, tags = (
    json.loads((BUNDLED / f"timm_{name}.json").read_text(encoding="utf-8"))
    for name in ("models", "tags")
  )
  return models, tags["tags"]


def structures(models: Models) -> list[list[str]]:
  """Groups models that differ only in sizes, images and classes, with shallow ones first."""
  groups: dict[str, list[str]] = {}
  for name, fields in models.items():
    flags = {key: value for key, value in fields.items() if key not in _SIZES}
    if "rotary" in flags:
      flags["rotary"] = {**flags["rotary"], "reference": "reference" in flags["rotary"]}
    groups.setdefault(json.dumps(flags, sort_keys=True), []).append(name)
  return [
    sorted(names, key=lambda name: (models[name]["depth"], name)) for names in groups.values()
  ]


def family(name: str) -> str:
  """Returns the family of a model."""
  return next(family for family, pattern in FAMILIES.items() if re.match(pattern, name))


def markdown(table: Mapping[str, Any], tags: Iterable[str]) -> str:
  """Returns the tables of `docs/models.md`: models by family, and unsupported models.

  Args:
    table: The content of `timm_models.json`.
    tags: Names of pre-trained weights, `NAME.TAG`.
  """
  refused, others = table["refused"], table["others"]
  count = Counter(tag.split(".")[0] for tag in tags)
  names = sorted(table["models"].keys() | count.keys())
  by_family: dict[str, list[str]] = {}
  for name in names:
    by_family.setdefault(family(name), []).append(name)
  lines = [
    f"{len(names)} models with {count.total()} tags of timm {table['timm']}:",
    "",
  ]
  lines += ["| family | models | tags | names |", "|---|---|---|---|"]
  for title in FAMILIES:
    members = by_family.get(title, [])
    listed = ", ".join(f"`{name}`" for name in members)
    lines.append(f"| {title} | {len(members)} | {sum(count[n] for n in members)} | {listed} |")
  lines += ["", f"{len(refused)} models of the same classes are not supported:", ""]
  lines += ["| reason | names |", "|---|---|"]
  for reason in sorted(set(refused.values())):
    listed = ", ".join(f"`{name}`" for name, why in refused.items() if why == reason)
    lines.append(f"| {reason} | {listed} |")
  lines += ["", "Other modules of timm contain models of other kinds:", ""]
  lines += [
    "| module | models | tags | what a plain Vision Transformer lacks |",
    "|---|---|---|---|",
  ]
  for module, (models, tagged) in others.items():
    lines.append(f"| `{module}` | {models} | {tagged} | {OTHERS[module]} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(markdown(*bundled()), end="")
