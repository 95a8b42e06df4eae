"""Plans: the tokens and units that each layer keeps, as JSON and as layer specs."""

from vitcomp_jax.plans.files import list_plans, load_plan, save_plan
from vitcomp_jax.plans.layer import PlanLayer
from vitcomp_jax.plans.parsing import parse_plan
from vitcomp_jax.plans.plan import PassedPlan, Plan, make_plan, plan_of

__all__ = [
  "PassedPlan",
  "Plan",
  "PlanLayer",
  "list_plans",
  "load_plan",
  "make_plan",
  "parse_plan",
  "plan_of",
  "save_plan",
]
