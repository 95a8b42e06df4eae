"""Published accuracies on ImageNet-1k, as stated by their sources."""

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from vitcomp_jax.cost import macs
from vitcomp_jax.methods import tome
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import list_plans, load_plan

NUM_CLASSES = 1000


def published_accuracies(spec: ViTSpec) -> dict[str, list[tuple[float, float]]]:
  """Returns published accuracies of a model.

  Args:
    spec: The model; a modified spec, such as one with another image size, has none.

  Returns:
    GMACs and top-1 in percent, by method and source. GMACs are counted here if the source does not
    state them.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.published_accuracies(vc.get_spec("deit_tiny_patch16_224"))["dense (DeiT's README)"]
    [(1.254, 72.2)]
  """
  if spec != get_spec(spec.name, NUM_CLASSES):
    return {}
  found = _of_plans(spec)
  for series, about in _results().get(spec.name, {}).items():
    found[f"{series} ({about['source']})"] = [
      (_gmacs(spec, point), point["top1"]) for point in about["points"]
    ]
  return found


def _of_plans(spec: ViTSpec) -> dict[str, list[tuple[float, float]]]:
  """Returns the accuracies of DiffRate, which are stored with its plans."""
  found: dict[str, list[tuple[float, float]]] = {}
  for plan in map(load_plan, list_plans()):
    about = plan.made_by.get("published")
    if about and plan.variant == spec.name:
      source = about["by"].partition("(")[2].rstrip(")") or about["by"]
      series = f"DiffRate, off the shelf ({source})"
      found.setdefault(series, []).append((plan.gmacs, about["top1"]))
  return found


def _gmacs(spec: ViTSpec, point: Mapping[str, Any]) -> float:
  """Returns the stated GMACs, or counts those of the point's plan, ToMe's r or the dense model."""
  if "gmacs" in point:
    return float(point["gmacs"])
  if "plan" in point:
    return load_plan(point["plan"]).gmacs
  layers = tome.layers(spec, point["tome_r"]) if "tome_r" in point else spec.dense_layers
  return macs.static_macs(spec, layers) / 1e9


def _results() -> dict[str, dict[str, Any]]:
  """Returns the sources and their points, by variant and method."""
  file = importlib.resources.files("vitcomp_jax") / "bundled" / "published_results.json"
  return dict(json.loads(file.read_text()))
