"""Writes the table of preprocessing for timm's weights.

    python tools/timm_tags.py

rewrites `vitcomp_jax/bundled/timm_tags.json`, with all tags of timm's models that are variants of
this library. It needs timm, unlike everything else here.
"""

import json
import pathlib
from typing import Any

import timm

from vitcomp_jax.models.variants import VARIANTS

FILE = pathlib.Path(__file__).parents[1] / "vitcomp_jax" / "bundled" / "timm_tags.json"


def table() -> dict[str, dict[str, Any]]:
  """Returns the preprocessing of each tag, by `NAME.TAG`."""
  bases = {name.split(".")[0] for name in VARIANTS}
  names = [name for name in timm.list_pretrained() if name.split(".")[0] in bases]
  return {name: _tag(name) for name in sorted(names)}


def _tag(name: str) -> dict[str, Any]:
  config = timm.models.get_pretrained_cfg(name)
  return {
    "mean": list(config.mean),
    "std": list(config.std),
    "crop_pct": config.crop_pct,
    "crop_mode": config.crop_mode,
    "interpolation": config.interpolation,
    "image_size": list(config.input_size[1:]),
    "num_classes": config.num_classes,
  }


def main() -> None:
  lines = [f'  "{name}": {json.dumps(tag)}' for name, tag in table().items()]
  text = ",\n".join(lines)
  FILE.write_text(f'{{\n"timm": "{timm.__version__}",\n"tags": {{\n{text}\n}}\n}}\n')


if __name__ == "__main__":
  main()
