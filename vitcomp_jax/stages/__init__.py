"""What a run does, one module per stage; each is a function of a `Run` that returns a summary."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from vitcomp_jax.config import Config, from_config_dict
from vitcomp_jax.stages.evaluate import evaluate
from vitcomp_jax.stages.pretrain import pretrain
from vitcomp_jax.stages.run import Run, open_run
from vitcomp_jax.stages.search import search

STAGES = {"pretrain": pretrain, "search": search, "evaluate": evaluate}


def run_stage(
  stage: str, config: Config | Mapping[str, Any], workdir: str | pathlib.Path | None = None
) -> dict[str, Any]:
  """Runs one stage from Python.

  Args:
    stage: `pretrain`, `search` or `evaluate`.
    config: A `Config`, or a mapping of its keys such as `default_config()`.
    workdir: Where the run is kept; none: `runs/STAGE`.

  Returns:
    What the stage reports; from a finished stage, what it reported then.
  """
  config = config if isinstance(config, Config) else from_config_dict(config)
  return finish_stage(open_run(config, pathlib.Path(workdir or f"runs/{stage}")), stage)


def finish_stage(run: Run, stage: str) -> dict[str, Any]:
  """Runs a stage of a run, unless it is finished."""
  finished = run.finished(stage)
  if finished is not None:
    logging.info("%s: finished before", stage)
    return finished
  return run.finish(stage, STAGES[stage](run))
