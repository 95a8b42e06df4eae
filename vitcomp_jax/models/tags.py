"""Looks up timm's preprocessing by architecture and pre-training tag, as in `NAME.TAG`.

It is stored in `bundled/timm_tags.json`, which `tools/timm_models.py` writes.
"""

import difflib
import functools
import importlib.resources
import json
import logging
from collections.abc import Mapping
from typing import Any

from vitcomp_jax.models.spec import ViTSpec

_HUB = ("hf-hub:", "timm/")


def tag_of(name: str) -> dict[str, Any] | None:
  """Returns timm's preprocessing for a pre-trained model; None if the tag is unknown.

  Args:
    name: `NAME.TAG`, optionally with the prefix `timm/` or `hf-hub:timm/`.

  Returns:
    `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation`, `image_size` and `num_classes`.
  """
  found = _table()["tags"].get(_without_hub(name))
  return None if found is None else dict(found)


def architecture(name: str) -> str | None:
  """Returns the name without its tag; None if the tag is unknown."""
  return _without_hub(name).split(".")[0] if tag_of(name) else None


def _without_hub(name: str) -> str:
  for prefix in _HUB:
    name = name.removeprefix(prefix)
  return name


def spec_changes(tag: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tag's values as fields of a `ViTSpec`, by name."""
  return {key: tuple(value) if isinstance(value, list) else value for key, value in tag.items()}


def near_tags(name: str) -> list[str]:
  """Returns up to three known tags of the same architecture, closest to `name` first."""
  architecture = name.split(".")[0] + "."
  known = [other for other in _table()["tags"] if other.startswith(architecture)]
  return difflib.get_close_matches(name, known, n=3, cutoff=0.0)


def timm_version() -> str:
  """Returns the version of timm whose tags are known."""
  return _table()["timm"]


def warn_unknown(name: str, spec: ViTSpec) -> None:
  """Warns that timm's preprocessing of some weights is unknown, and names the one used instead.

  Args:
    name: Name of the weights, as the user gave it.
    spec: Spec of the model, whose preprocessing is used.
  """
  near = near_tags(_without_hub(name))
  logging.warning(
    "%s: timm %s has no such tag, so images are prepared as for %s (mean %s, std %s, crop_pct %g, "
    "%s, %s); %s",
    name,
    timm_version(),
    spec.name,
    spec.mean,
    spec.std,
    spec.crop_pct,
    spec.crop_mode,
    spec.interpolation,
    f"near it are {', '.join(near)}" if near else "see config.data.mean and the keys beside it",
  )


@functools.cache
def _table() -> dict[str, Any]:
  file = importlib.resources.files("vitcomp_jax") / "bundled" / "timm_tags.json"
  return json.loads(file.read_text(encoding="utf-8"))
