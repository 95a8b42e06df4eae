"""Checks that the stage `search` makes before it begins."""

import jax

from vitcomp_jax import exporting
from vitcomp_jax.cost import latency
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.runs.run import Run
from vitcomp_jax.stages import search
from vitcomp_jax.training.search_loss import check_loss


def check(run: Run) -> None:
  """Rejects a budget that cannot be met, and a loss that cannot be computed."""
  inputs = run.inputs
  inputs.check_data("train")
  slim = run.config.slim
  cuts_patches = slim.w_patch > 0 and (slim.budgets is None or slim.budgets[-1] < 1)
  if "slim" in run.config.stages and cuts_patches:
    raise search.no_positions()
  inputs.check_batches("search")
  check_loss(search.loss_of(run), inputs.spec, inputs.train_data.has_labels, "config.search.loss")
  if run.config.budget.latency_ms is not None:
    _check_latency(run)
  for suffix in inputs.targets:
    search.method_of(run, suffix).check()
  if run.config.search.what != "tokens":
    _check_widths(run)
  if not search.steps_of(run):
    raise UserError(
      f"config.search.steps: expected at least one for each of {len(inputs.targets)} budgets, "
      f"got {run.config.search.steps} for all."
    )


def _check_widths(run: Run) -> None:
  """Rejects runs that cannot save the weights that a search of widths makes."""
  got = ""
  if len(run.inputs.targets) > 1:
    got = f"{len(run.inputs.targets)} budgets, each of which has weights of its own"
  elif jax.process_count() > 1:
    got = f"{jax.process_count()} processes"
  elif "slim" in run.config.stages:
    got = "the stage slim, which trains other widths"
  if got:
    raise UserError(
      f"config.search.what: expected tokens with {got}, got {run.config.search.what}."
    )


def _check_latency(run: Run) -> None:
  """Rejects models for which no latency table can be measured."""
  spec, runtime = run.inputs.spec, run.config.budget.runtime
  latency.check(spec, runtime, "config.budget.latency_ms")
  if runtime == "onnxruntime":
    exporting.check("onnx", exporting.Program(build(spec, spec.dense_layers), {}))
  if run.artefacts.base_plan is not None or "slim" in run.config.stages:
    raise UserError(
      "config.budget.latency_ms: expected a search on the dense model, got one on slimmed layers; "
      "give fraction or gmacs."
    )
