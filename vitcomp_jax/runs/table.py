"""The table of a run: the models that have rows, and their measurements."""

import dataclasses
import math

from vitcomp_jax import scoring
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.registry import within
from vitcomp_jax.metrics import progress
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.spec import LayerSpec
from vitcomp_jax.plans import Plan
from vitcomp_jax.results import Result, Row, Variant, environment
from vitcomp_jax.runs.run import Run
from vitcomp_jax.scoring import Outcomes
from vitcomp_jax.weights.loading import Params


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A model that has a row in the table.

  Attributes:
    row: Row that identifies the model, without metrics.
    layers: Layers of the model.
    params: Weights of the model.
  """

  row: Row
  layers: tuple[LayerSpec, ...]
  params: Params

  @property
  def name(self) -> str:
    return self.row.name


def candidates(run: Run) -> dict[str, Candidate]:
  """Returns the model of every row that `evaluate` measures, by row name."""
  artefacts, found = run.artefacts, deployed(run)
  if artefacts.plan:
    halves, whole = _halves(run, artefacts.plan), found.pop(plan_row(run, artefacts.plan).name)
    others = [*halves, *_other_weights(run, artefacts.plan), whole]
    found |= {other.name: other for other in others}
  elif run.workdir.is_finished("finetune"):
    row = Row(method="dense", variant="finetune")
    found[row.name] = Candidate(row, run.inputs.spec.dense_layers, artefacts.params)
  return found | {candidate.name: candidate for candidate in _baselines(run)}


def deployed(run: Run) -> dict[str, Candidate]:
  """Returns the dense model, the models of the front, and that of the current plan, by row name."""
  artefacts, spec = run.artefacts, run.inputs.spec
  found = []
  if run.config.evaluate.dense:
    found.append(Candidate(Row(method="dense"), spec.dense_layers, artefacts.dense_params))
  for plan in artefacts.front.values():
    layers = plan.layers_for(spec)
    found.append(Candidate(plan_row(run, plan), layers, artefacts.params_before_finetune))
  if artefacts.plan:
    found.append(Candidate(plan_row(run, artefacts.plan), artefacts.layers, artefacts.params))
  return {candidate.name: candidate for candidate in found}


def plan_row(run: Run, plan: Plan) -> Row:
  """Returns the row of a plan, named by its method and, with several budgets, by its budget."""
  method = method_of(plan)
  budget = next((share for share, other in run.artefacts.front.items() if other == plan), None)
  # A baseline's row may have the same name.
  variant: Variant | None = "plan" if method in ("dense", *run.config.evaluate.baselines) else None
  return Row(method=method, budget=budget, variant=variant, seed=seed_of(plan))


def method_of(plan: Plan) -> str:
  """Returns the name of the method that made a plan; `plan` if unknown."""
  method = plan.made_by.get("method")
  return method if isinstance(method, str) else "plan"


def seed_of(plan: Plan) -> int | None:
  """Returns the seed of the search that made a plan; None if unknown."""
  seed = plan.made_by.get("seed")
  return seed if isinstance(seed, int) else None


def _halves(run: Run, plan: Plan) -> list[Candidate]:
  """Returns both halves of a plan that slims and also removes tokens after attention."""
  spec, layers = run.inputs.spec, run.artefacts.layers
  if not plan.indices or all(layer.reduce == keep_all for layer in layers):
    return []
  whole = tuple(dataclasses.replace(layer, reduce=keep_all) for layer in layers)
  found = [Candidate(Row(method="vit_slim"), whole, run.artefacts.params)]
  if run.config.evaluate.dense:
    pairs = zip(spec.dense_layers, layers, strict=True)
    reduced = tuple(dataclasses.replace(dense, reduce=layer.reduce) for dense, layer in pairs)
    row = Row(method=run.config.search.method)
    found.append(Candidate(row, reduced, run.artefacts.dense_params))
  return found


def _other_weights(run: Run, plan: Plan) -> list[Candidate]:
  """Returns the plan before `finetune`, and the plan masked in the dense model, if configured."""
  config, artefacts, row = run.config.evaluate, run.artefacts, plan_row(run, plan)
  found = []
  if config.before_finetune:
    before = dataclasses.replace(row, variant="before_finetune")
    found.append(Candidate(before, artefacts.layers, artefacts.params_before_finetune))
  if config.masked:
    masked = dataclasses.replace(row, variant="masked")
    layers = plan.masked_layers_for(run.inputs.spec)
    found.append(Candidate(masked, layers, artefacts.searched_params))
  return found


def _baselines(run: Run) -> list[Candidate]:
  """Returns the schedules without a search, at the budgets of the run's plans."""
  names = run.config.evaluate.baselines
  if not names:
    return []
  artefacts, spec = run.artefacts, run.inputs.spec
  budgets: dict[float | None, float]
  budgets = {share: plan.gmacs for share, plan in artefacts.front.items()}
  if not budgets:
    budgets = {None: artefacts.plan.gmacs if artefacts.plan else run.inputs.target_gmacs}
  found, importance = [], _importance(run)
  for name in names:
    for share, gmacs in budgets.items():
      layers = within(name, spec, gmacs, importance)
      found.append(Candidate(Row(method=name, budget=share), layers, artefacts.dense_params))
  return found


def _importance(run: Run) -> str:
  """Returns the importance metric of hand-made schedules; `auto` takes that of the plan, if any."""
  asked = run.config.search.importance
  for layer in run.artefacts.layers if asked == "auto" else ():
    if isinstance(layer.reduce, PruneMerge):
      return layer.reduce.importance
  return asked


def outcomes(run: Run, model: Backbone, params: Params, name: str) -> Outcomes:
  """Measures one model on every evaluation image, see `scoring.outcomes`."""
  inputs = run.inputs
  total = math.ceil(inputs.eval_data.num_examples / run.config.evaluate.batch_size)
  batches = progress(inputs.eval_batches(), f"evaluate {name}", total)
  dense_params = None if inputs.has_scores else run.artefacts.dense_params
  return scoring.outcomes(model, params, batches, inputs.layout, name, dense_params)


def measured(run: Run, candidate: Candidate) -> tuple[Row, int]:
  """Measures a model; returns its row and the number of examples."""
  model = build(run.inputs.spec, candidate.layers)
  found = outcomes(run, model, candidate.params, candidate.name)
  return scoring.measured(candidate.row, found, model), len(next(iter(found.values())))


def empty_result(run: Run) -> Result:
  """Returns a result without rows."""
  data = run.inputs.eval_data
  return Result(data.name, data.split, data.num_examples, **environment())


def result_so_far(run: Run) -> Result:
  """Returns a result with the rows measured so far and their number of examples."""
  empty, path = empty_result(run), run.workdir.path / "result.json"
  if not path.exists():
    return empty
  there = Result.read(path)
  return dataclasses.replace(empty, rows=there.rows, examples=there.examples)
