"""Lists all methods; looks up reducers by type and schedules by name."""

import logging

from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods import diffrate, dynamicvit, evit, handmade, tome, vit_slim
from vitcomp_jax.methods.base import Layers, Method, Schedule
from vitcomp_jax.methods.bisection import bracket
from vitcomp_jax.methods.handmade import TOLERANCE, with_importance
from vitcomp_jax.models.reducers import KeepAll, StaticReducer
from vitcomp_jax.models.spec import ViTSpec

# To add a method, write its module and list it here.
METHODS: list[Method] = [
  handmade.METHOD,
  vit_slim.METHOD,
  diffrate.METHOD,
  tome.METHOD,
  evit.METHOD,
  dynamicvit.METHOD,
]


def reducer_types() -> dict[str, type[StaticReducer]]:
  """Returns the static reducers that plans may hold, by name in JSON."""
  found: list[type[StaticReducer]] = [KeepAll]
  for method in METHODS:
    found += method.reducers
  return {reducer.type_name: reducer for reducer in found}


def schedules() -> dict[str, Schedule]:
  """Returns the schedules without a search, by row name."""
  found: dict[str, Schedule] = {}
  for method in METHODS:
    found |= method.schedules
  return found


def untrained_schedules() -> list[str]:
  """Returns the names of the schedules that need no training."""
  found: list[str] = []
  for method in METHODS:
    found += () if method.is_trained else method.schedules
  return found


def within(name: str, spec: ViTSpec, target_gmacs: float, importance: str = "auto") -> Layers:
  """Makes the layers of a named schedule at the strength that meets a budget.

  Args:
    name: One of `schedules()`.
    spec: The model.
    target_gmacs: The budget in 1e9 multiply-accumulates; the nearest strength is used.
    importance: Importance metric of hand-made schedules, see `ViTSpec.importance`.

  Raises:
    UserError: For an unknown name, or a budget below the cost of the strongest schedule.
  """
  known = schedules()
  if name not in known:
    raise UserError(f"schedule: expected one of {', '.join(known)}, got {name!r}.")
  importance = spec.importance(importance)
  make = known[name]
  least = macs.static_macs(spec, make(spec, 1.0)) / 1e9
  if target_gmacs < (1 - TOLERANCE) * least:
    raise UserError(
      f"config.budget: expected at least {least:.4g} GMACs, what {name} costs {spec.name} at its "
      f"strongest, got {target_gmacs:.4g}."
    )

  def excess(layers: Layers) -> float:
    return macs.static_macs(spec, layers) - target_gmacs * 1e9

  # Stronger schedules cost less.
  strengths = bracket(lambda strength: excess(make(spec, strength)) > 0, below=1.0, above=0.0)
  nearest = min((make(spec, s) for s in strengths), key=lambda layers: abs(excess(layers)))
  gmacs = macs.static_macs(spec, nearest) / 1e9
  if abs(gmacs - target_gmacs) > TOLERANCE * target_gmacs:
    logging.warning("%s: the nearest has %.4g GMACs, not %.4g", name, gmacs, target_gmacs)
  return nearest if name == "random" else with_importance(nearest, importance)
