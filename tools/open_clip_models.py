"""Writes the table of OpenCLIP's models whose image tower is a plain Vision Transformer.

    python tools/open_clip_models.py

rewrites `vitcomp_jax/bundled/open_clip_models.json` from the image towers in OpenCLIP's own
configurations. Preprocessing is included if all weights of a name agree on it. The script needs
OpenCLIP and timm.
"""

import json
import pathlib
from typing import Any

import open_clip
import timm
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

FILE = pathlib.Path(__file__).parents[1] / "vitcomp_jax" / "bundled" / "open_clip_models.json"
# OpenAI's names of its models, and their names in OpenCLIP, with QuickGELU.
OPENAI = {
  "ViT-B/32": "ViT-B-32-quickgelu",
  "ViT-B/16": "ViT-B-16-quickgelu",
  "ViT-L/14": "ViT-L-14-quickgelu",
  "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
OPENAI_PREPROCESS = get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
# timm's modules with plain towers; others have convolutions, windows or their own model classes.
PLAIN = ("timm.models.vision_transformer", "timm.models.eva")


def table() -> dict[str, dict[str, Any]]:
  """Returns configurations by name, in the format of `open_clip_config.json`."""
  names = sorted(name for name in open_clip.list_models() if _is_plain(name))
  models = {name: _config(name) for name in names}
  preprocess = {"preprocess_cfg": {key: OPENAI_PREPROCESS[key] for key in PREPROCESS}}
  return models | {name: models[own] | preprocess for name, own in OPENAI.items()}


def _is_plain(name: str) -> bool:
  tower = open_clip.get_model_config(name)["vision_cfg"]
  if timm_name := tower.get("timm_model_name"):
    return timm.models.model_entrypoint(timm_name).__module__ in PLAIN
  return isinstance(tower["layers"], int) and not tower.get("attentional_pool")


def _config(name: str) -> dict[str, Any]:
  model = open_clip.get_model_config(name)
  kept = {key: model[key] for key in ("embed_dim", "quick_gelu", "vision_cfg") if key in model}
  tags = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
  if not tags:  # then OpenCLIP trains with its defaults
    return {"model_cfg": kept, "preprocess_cfg": {}}
  found = [{key: tag[key] for key in PREPROCESS} for tag in tags]
  agreed = all(each == found[0] for each in found)
  return {"model_cfg": kept} | ({"preprocess_cfg": found[0]} if agreed else {})


def main() -> None:
  lines = [f'  "{name}": {json.dumps(config)}' for name, config in table().items()]
  text = ",\n".join(lines)
  FILE.write_text(f'{{\n"open_clip": "{open_clip.__version__}",\n"models": {{\n{text}\n}}\n}}\n')


if __name__ == "__main__":
  main()
