"""Budgets given by a caller: a fraction of the dense model's cost, or an absolute cost."""

from collections.abc import Mapping

from vitcomp_jax.cost.cost_models import CostModel
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import ViTSpec


def target(spec: ViTSpec, cost: CostModel, asked: Mapping[str, float | None]) -> float:
  """Resolves the given budget to the cost's unit.

  Args:
    spec: The dense model.
    cost: Cost that the budget limits.
    asked: Budgets by name, all but one None. `macs` is a fraction of the dense model's cost; any
      other is in the cost's unit.

  Raises:
    UserError: If not exactly one is given, or it is not above 0 and at most the dense model's cost.
  """
  given = {name: value for name, value in asked.items() if value is not None}
  if len(given) != 1:
    *names, last = asked
    got = " and ".join(given) or "none"
    raise UserError(f"budget: expected one of {', '.join(names)} and {last}, got {got}.")
  ((name, value),) = given.items()
  dense = cost.static(spec, spec.dense_layers)
  most = 1.0 if name == "macs" else dense
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
    raise UserError(
      f"{name}: expected more than 0 and at most {most:.4g}, what the dense model takes, got "
      f"{value!r}."
    )
  return value * dense if name == "macs" else float(value)
