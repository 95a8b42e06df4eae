"""Reads the budgets of a config."""

from vitcomp_jax.config import BudgetConfig
from vitcomp_jax.cost.cost_models import CostModel
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import ViTSpec

_KINDS = ("fraction", "fractions", "gmacs", "latency_ms")


def targets(budget: BudgetConfig, cost: CostModel, spec: ViTSpec) -> dict[str, float]:
  """Returns the budgets in the unit of the cost, by the suffix of their plans' names.

  Args:
    budget: The budget part of the config.
    cost: Cost that the budget limits.
    spec: The dense model.

  Returns:
    A single budget with an empty suffix, or several with suffixes `@FRACTION`.

  Raises:
    UserError: If not exactly one kind of budget is given, a budget is not above 0 and at most the
      dense model's cost, or several budgets are not in decreasing order.
  """
  kind, asked = given(budget)
  dense = cost.static(spec, spec.dense_layers)
  shares = budget.fractions
  if shares is not None:
    if not shares or sorted(set(shares), reverse=True) != list(shares):
      raise UserError(f"config.budget.fractions: expected falling shares, got {shares}.")
    for share in shares:
      _check(kind, share, 1.0, "of the dense model")
    return {f"@{share:g}": share * dense for share in shares}
  if kind == cost.key:
    _check(kind, asked, dense, f"{cost.unit}, what the dense model takes")
    return {"": asked}
  _check(kind, asked, 1.0, "of the dense model")
  return {"": asked * dense}


def check_single_gmacs(budget: BudgetConfig) -> None:
  """Rejects budgets that only a search of token counts can meet: several budgets, or a latency."""
  for name in ("latency_ms", "fractions"):
    if getattr(budget, name) is not None:
      raise UserError(
        f"config.budget.{name}: expected fraction or gmacs here, as only the stage search can "
        f"meet {name}, got {getattr(budget, name)}."
      )


def given(budget: BudgetConfig) -> tuple[str, float]:
  """Returns the kind of budget that is given, and its value.

  Raises:
    UserError: If none or several are given.
  """
  given = {kind: getattr(budget, kind) for kind in _KINDS if getattr(budget, kind) is not None}
  if len(given) != 1:
    got = " and ".join(f"{kind} {value}" for kind, value in given.items()) or "none"
    raise UserError(
      f"config.budget: expected one of {', '.join(_KINDS)}, got {got}; set the others to none."
    )
  if budget.runtime != "jax" and "latency_ms" not in given:
    raise UserError(
      f"config.budget.runtime: expected jax without latency_ms, got {budget.runtime}; only a "
      "latency depends on what runs the model."
    )
  return next(iter(given.items()))


def _check(kind: str, value: float, most: float, what: str) -> None:
  if not 0 < value <= most:
    raise UserError(
      f"config.budget.{kind}: expected more than 0 and at most {most:.4g} {what}, got {value:g}."
    )
