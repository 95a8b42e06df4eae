"""Reads and writes plan.json files, and looks up the published plans by name."""

import difflib
import functools
import importlib.resources
import json
import os
import pathlib
from typing import Any

from vitcomp_jax import paths, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import reducer_types
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans.layer import PlanLayer
from vitcomp_jax.plans.parsing import parse_plan
from vitcomp_jax.plans.plan import Plan


def list_plans() -> list[str]:
  """Returns the names of the published plans.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.list_plans()[0]
    'diffrate/caformer_s36@5.2'
  """
  return sorted(_published())


def load_plan(name: str | os.PathLike[str]) -> Plan:
  """Loads a published plan by name, such as `diffrate/deit_small@2.9`, or a plan from a plan.json.

  A published plan's `made_by` holds the paper and, if there is one, the published accuracy.

  Args:
    name: One of `list_plans()`, or the path of a plan.json.

  Raises:
    UserError: If there is no such plan, or it is invalid.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.load_plan("diffrate/deit_small@2.9").gmacs
    2.905
  """
  name = os.fspath(name)
  if name in _published():
    return _from_published(name)
  path = pathlib.Path(paths.expand(name))
  if not path.is_file():
    near = ", ".join(difflib.get_close_matches(name, _published(), n=3))
    hint = f"published ones near it: {near}" if near else "list_plans() names the published ones"
    raise UserError(f"plan: expected a file or a published plan, got {name!r}; {hint}.")
  try:
    values = strict_json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"plan {name}: expected JSON with finite numbers and every key once, got something else: "
      f"{error}."
    ) from error
  return parse_plan(values, name)


def save_plan(plan: Plan, path: pathlib.Path) -> None:
  """Writes a plan.json."""
  write_json(path, plan.to_json())


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
  file = importlib.resources.files("vitcomp_jax") / "bundled" / "published_plans.json"
  return dict(json.loads(file.read_text()))


def _from_published(name: str) -> Plan:
  entry = _published()[name]
  about = {k: v for k, v in entry.items() if k in ("source", "published")}
  made_by = {"method": "diffrate", **about}
  # CAFormer's authors only merge, with whole sizes.
  spec, merges = get_spec(entry["variant"]), entry["prune_keep"] is None
  prune_keep = [spec.tokens_at(i) for i in range(spec.depth)] if merges else entry["prune_keep"]
  make, layers = reducer_types()["prune_merge"].from_json, []
  for prune, merge in zip(prune_keep, entry["merge_keep"], strict=True):
    counts = {"prune_keep": prune, "merge_keep": merge}
    options = {"importance": spec.importance(), "whole_sizes": merges}
    layers.append(PlanLayer(reduce=make(counts | options, name)))
  return Plan(entry["variant"], entry["num_tokens"], tuple(layers), entry["gmacs"], made_by)
