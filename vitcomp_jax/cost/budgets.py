"""Budgets given by a caller: a fraction of the dense model's cost, or an absolute cost."""

import math
from collections.abc import Mapping

from vitcomp_jax.cost.cost_models import CostModel
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import ViTSpec


def check(asked: Mapping[str, float | None]) -> tuple[str, float]:
  """Returns the name and the value of the one budget that is given.

  Args:
    asked: Budgets by name, all but one of them None.

  Raises:
    UserError: If not exactly one is given, or it is not a number above 0.
  """
  given = {name: value for name, value in asked.items() if value is not None}
  if len(given) != 1:
    *names, last = asked
    got = " and ".join(given) or "none"
    raise UserError(f"budget: expected one of {', '.join(names)} and {last}, got {got}.")
  ((name, value),) = given.items()
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
    raise UserError(f"{name}: expected a number above 0, got {value!r}.")
  return name, float(value)


def target(spec: ViTSpec, cost: CostModel, asked: Mapping[str, float | None]) -> float:
  """Converts the one budget that is given to the cost's unit.

  Args:
    spec: The dense model.
    cost: The cost model that the budget limits.
    asked: Budgets by name, all but one of them None. `macs` is a fraction of the dense model's
      cost; any other is in the cost's unit.

  Raises:
    UserError: If not exactly one is given, it is not above 0, or it exceeds the dense model's cost.
  """
  name, value = check(asked)
  dense = cost.static(spec, spec.dense_layers)
  most = 1.0 if name == "macs" else dense
  if value > most:
    raise UserError(
      f"{name}: expected more than 0 and at most {most:.4g}, what the dense model takes, got "
      f"{value:g}."
    )
  return value * dense if name == "macs" else value
