"""Looks up timm's preprocessing by architecture and pre-training tag, as in `NAME.TAG`.

`bundled/timm_tags.json` has it; `tools/timm_tags.py` makes that file.
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
  """Returns what timm records for a pre-trained model; None if the tag is not known.

  Args:
    name: `NAME.TAG`, or with `timm/` or `hf-hub:timm/` before it.

  Returns:
    `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation`, `image_size` and `num_classes`.
  """
  found = _table()["tags"].get(_without_hub(name))
  return None if found is None else dict(found)


def architecture(name: str) -> str | None:
  """Returns the name without its tag; None if the tag is not known."""
  return _without_hub(name).split(".")[0] if tag_of(name) else None


def _without_hub(name: str) -> str:
  for prefix in _HUB:
    name = name.removeprefix(prefix)
  return name


def spec_changes(tag: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tag's values as fields of a `ViTSpec`, by name."""
  return {key: tuple(value) if isinstance(value, list) else value for key, value in tag.items()}


def near_tags(name: str) -> list[str]:
  """Returns up to three known tags of the same architecture that are closest to `name`."""
  architecture = name.split(".")[0] + "."
  known = [other for other in _table()["tags"] if other.startswith(architecture)]
  return difflib.get_close_matches(name, known, n=3, cutoff=0.0)


def timm_version() -> str:
  """Returns the version of timm whose tags are known."""
  return _table()["timm"]


def warn_unknown(name: str, spec: ViTSpec) -> None:
  """Warns that timm's preprocessing of weights is not known, and says what is done instead.

  Args:
    name: Of the weights, as the user gave it.
    spec: Whose preprocessing is taken.
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
