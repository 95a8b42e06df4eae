"""Stage `evaluate`: measures accuracy and cost of the dense model, the plan and the baselines."""

import dataclasses
from typing import Any

from vitcomp_jax import strict_json
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import untrained_schedules
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import removes_tokens
from vitcomp_jax.reporting import model_plots, plots
from vitcomp_jax.results import Result
from vitcomp_jax.runs import reports, table
from vitcomp_jax.runs.run import Run


def check(run: Run) -> None:
  """Rejects a plan or weights that do not fit, labels of unknown classes, and an empty table."""
  config, plan = run.config, run.artefacts.plan
  searches = bool({"search", "slim"} & set(config.stages))
  run.inputs.check_data("eval")
  if plan:
    plan.layers_for(run.inputs.spec)
    _check_dense(run)
  elif config.evaluate.baselines and not searches:
    run.inputs.check_budget()
  _check_baselines(run)
  has_searched = "slim" in config.stages or (run.workdir.path / "searched.safetensors").exists()
  if config.evaluate.masked and not has_searched:
    raise UserError("config.evaluate.masked: expected the stage slim in this run, got none.")
  if not (config.evaluate.dense or config.evaluate.baselines or plan or searches):
    raise UserError(
      "config.evaluate: expected something to evaluate (dense, baselines, or model.plan), got none."
    )


def _check_dense(run: Run) -> None:
  """Rejects a row for the dense model if the weights are those of a slimmed model."""
  plan = run.artefacts.plan
  if plan is not None and plan.is_slimmed and run.config.evaluate.dense:
    try:
      run.artefacts.check_dense_weights()
    except UserError as error:
      raise UserError(
        f"config.evaluate.dense: expected False, or the dense model's weights ({error})"
      ) from error


def _check_baselines(run: Run) -> None:
  known = untrained_schedules()
  for name in run.config.evaluate.baselines:
    if name not in known:
      raise UserError(
        f"config.evaluate.baselines: expected some of {', '.join(known)}, got {name}."
      )
    run.inputs.spec.importance(run.config.search.importance, "config.search.importance")


def run(run: Run) -> Result:
  """Evaluates every row, and writes `result.json`, `report.md` and the plots.

  Returns:
    The content of `result.json`.
  """
  candidates, result = table.candidates(run), table.result_so_far(run)
  rows = result.by_name
  for name, candidate in candidates.items():
    there = rows.get(name)
    if there is None or not there.is_evaluated:
      row, examples = table.measured(run, candidate)
      # The stage `benchmark` may already have added the row.
      speeds = there.images_per_second if there else None
      rows[name] = dataclasses.replace(row, images_per_second=speeds)
      result = dataclasses.replace(result, rows=tuple(rows.values()), examples=examples)
      result.write(run.workdir.path / "result.json")
  models = {name: candidate.layers for name, candidate in candidates.items()}
  reports.draw(run, models, result.rows)
  _draw_token_maps(run)
  reports.write_report(run)
  return result


def made(run: Run) -> dict[str, Any]:
  """Returns the content of `result.json`."""
  return strict_json.read(run.workdir.path / "result.json")


def _draw_token_maps(run: Run) -> None:
  """Draws token maps of a few images at four depths, if the plan removes tokens."""
  inputs, artefacts, count = run.inputs, run.artefacts, run.config.evaluate.token_maps
  if not count or not artefacts.plan or not removes_tokens(artefacts.layers):
    return
  batch, model = inputs.eval_data.sample(count), build(inputs.spec, artefacts.layers)
  layers = model_plots.spaced(inputs.spec.depth, 4)
  titles = reports.titles(run, batch)
  figure = model_plots.token_maps(model, artefacts.params, batch["image"], titles, layers)
  plots.save(figure, run.workdir.path / "figures", "token_maps")
