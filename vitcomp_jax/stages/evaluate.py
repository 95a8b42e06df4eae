"""Stage `evaluate`: accuracy and cost of the dense model, the plan and hand-made schedules."""

import dataclasses
from typing import Any

from vitcomp_jax import scoring
from vitcomp_jax.atomic import write_json
from vitcomp_jax.data.loader import Batch
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import untrained_schedules, within
from vitcomp_jax.models.build import build
from vitcomp_jax.models.reducers import keep_all
from vitcomp_jax.models.spec import LayerSpec, removes_tokens
from vitcomp_jax.plans import Plan
from vitcomp_jax.reporting import model_plots, plots, report, run_plots
from vitcomp_jax.runs.run import Run, environment, read_json
from vitcomp_jax.weights.loading import Params

_FIGURES = {"loss", "feature_divergence"}  # One of them is in every row that was evaluated.


def check(run: Run) -> None:
  """Refuses a plan or weights that do not fit, labels without a class, and an empty table."""
  config, plan = run.config, run.plan
  searches = bool({"search", "slim"} & set(config.stages))
  run.open_data("eval")
  if plan:
    plan.layers_for(run.spec)
    _check_dense(run, plan)
  elif config.evaluate.baselines and not searches:
    run.target_gmacs  # noqa: B018, raises
  known = untrained_schedules()
  for name in config.evaluate.baselines:
    if name not in known:
      raise UserError(
        f"config.evaluate.baselines: expected some of {', '.join(known)}, got {name}."
      )
    run.spec.importance(config.search.importance)
  has_searched = "slim" in config.stages or (run.workdir / "searched.safetensors").exists()
  if config.evaluate.masked and not has_searched:
    raise UserError("config.evaluate.masked: expected the stage slim in this run, got none.")
  if not (config.evaluate.dense or config.evaluate.baselines or plan or searches):
    raise UserError(
      "config.evaluate: expected something to evaluate (dense, baselines, or model.plan), got none."
    )


def _check_dense(run: Run, plan: Plan) -> None:
  """Refuses a row for the dense model where the weights are a slimmed one's."""
  if plan.indices and run.config.evaluate.dense:
    try:
      run.dense_params  # noqa: B018, raises
    except UserError as error:
      raise UserError(
        f"config.evaluate.dense: expected False, or the dense model's weights ({error})"
      ) from error


def evaluate(run: Run) -> dict[str, Any]:
  """Evaluates every row, and writes `result.json`, `report.md` and the figures.

  Returns:
    The content of `result.json`.
  """
  rows, result = rows_of(run), result_so_far(run)
  there = {row["name"]: row for row in result["rows"]}
  for name, row in rows.items():
    if not _FIGURES & there.get(name, {}).keys():
      model = build(run.spec, row.layers)
      found = scoring.outcomes(model, row.params, run, name)
      # A benchmark may have made the row.
      there[name] = scoring.row(found, model, name) | there.get(name, {})
      result |= {"rows": list(there.values()), "examples": len(next(iter(found.values())))}
      write_json(run.workdir / "result.json", result)
  run_plots.draw(run, {name: row.layers for name, row in rows.items()}, result["rows"])
  if run.plan and removes_tokens(run.layers) and run.config.evaluate.token_maps:
    _draw_token_maps(run, run.plan)
  write_report(run)
  return result


def empty_result(run: Run) -> dict[str, Any]:
  """The content of a `result.json` without rows."""
  data = run.eval_data
  about = {"dataset": data.name, "split": data.split, "examples": data.num_examples}
  return {**about, **environment(), "rows": []}


def made(run: Run) -> dict[str, Any]:
  """The content of `result.json`."""
  return read_json(run.workdir / "result.json")


def result_so_far(run: Run) -> dict[str, Any]:
  """The content of a `result.json`, with the rows that were measured before and their examples."""
  there = made(run) if (run.workdir / "result.json").exists() else {}
  return empty_result(run) | {key: there[key] for key in ("rows", "examples") if key in there}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table before it is measured."""

  layers: tuple[LayerSpec, ...]
  params: Params


def rows_of(run: Run) -> dict[str, Row]:
  """The model of every row, by name."""
  config, spec, plan = run.config.evaluate, run.spec, run.plan
  rows = {"dense": Row(spec.dense_layers, run.dense_params)} if config.dense else {}
  for name, other in run.front.items():
    rows[name] = Row(other.layers_for(spec), run.params_before_finetune)
  if plan:
    rows |= _plan_rows(run, plan)
  elif run.finished("finetune"):
    rows["dense+finetune"] = Row(spec.dense_layers, run.params)
  for name in config.baselines:
    for suffix, gmacs in _baseline_gmacs(run).items():
      layers = within(name, spec, gmacs, run.config.search.importance)
      rows[f"{name}{suffix}"] = Row(layers, run.dense_params)
  return rows


def _baseline_gmacs(run: Run) -> dict[str, float]:
  """Returns the budgets of schedules without a search, by the suffix of their row names."""
  if run.front:
    return {name[name.index("@") :]: plan.gmacs for name, plan in run.front.items()}
  return {"": run.plan.gmacs if run.plan else run.target_gmacs}


def plan_name(run: Run, plan: Plan) -> str:
  """The name of a plan's row: its method's, and the budget where a search met several."""
  for name, other in run.front.items():
    if other == plan:
      return name
  method = plan.made_by.get("method")
  known = isinstance(method, str) and method not in ("dense", *run.config.evaluate.baselines)
  return str(method) if known else "diffrate"


def _plan_rows(run: Run, plan: Plan) -> dict[str, Row]:
  """The plan, and each half of one that both slims and removes tokens."""
  name, rows = plan_name(run, plan), {}
  if plan.indices and "+" in name:
    slimmed, _, searched = name.partition("+")
    whole = tuple(dataclasses.replace(layer, reduce=keep_all) for layer in run.layers)
    rows[slimmed] = Row(whole, run.params)
    if run.config.evaluate.dense:
      reduced = zip(run.spec.dense_layers, run.layers, strict=True)
      rates = tuple(dataclasses.replace(dense, reduce=layer.reduce) for dense, layer in reduced)
      rows[searched] = Row(rates, run.dense_params)
  if run.config.evaluate.before_finetune:
    rows[f"{name}@before_finetune"] = Row(run.layers, run.params_before_finetune)
  if run.config.evaluate.masked:
    rows[f"{name}@masked"] = Row(plan.masked_layers_for(run.spec), run.searched_params)
  return rows | {name: Row(run.layers, run.params)}


def write_report(run: Run, complete: bool = False) -> None:
  """Writes the report of what the stages have measured and drawn so far.

  Args:
    run: Which it is of.
    complete: Whether the stage `visualize` has drawn all that there is.
  """
  plan, summary = run.plan, run.finished("search")
  kept = run_plots.kept_counts(run.spec, run.layers) if plan else []
  plan_json = plan.to_json() if plan else None
  slimming = run.finished("slim")
  complete = complete or run.finished("visualize") is not None
  result = result_so_far(run)
  report.write_report(run.workdir, result, plan_json, kept, summary, slimming, complete)


def _draw_token_maps(run: Run, plan: Plan) -> None:
  """Draws what the plan does to a few images, at four depths."""
  data, model = run.eval_data, build(run.spec, plan.layers_for(run.spec))
  batch = data.sample(run.config.evaluate.token_maps)
  figure = model_plots.token_maps(
    model, run.params, batch["image"], titles(run, batch), model_plots.spaced(run.spec.depth, 4)
  )
  plots.save(figure, run.workdir / "figures", "token_maps")


def titles(run: Run, batch: Batch) -> list[str] | None:
  """The names of the classes of images, if they have labels."""
  data = run.eval_data
  names = run.class_names or data.class_names
  return [names[label] for label in batch["label"]] if data.has_labels else None
