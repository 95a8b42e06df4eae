"""The stages of a run, one module each."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitcomp_jax import paths
from vitcomp_jax.config import Config, from_config_dict
from vitcomp_jax.records import Record
from vitcomp_jax.runs.ownership import owned
from vitcomp_jax.runs.run import Run, open_run
from vitcomp_jax.stages import (
  benchmark,
  compare,
  evaluate,
  export,
  finetune,
  pretrain,
  search,
  slim,
  visualize,
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    check: Raises a `UserError` for what the stage could not do; called before any stage begins.
    run: Does it; returns what it has to report, which marks the stage as finished.
    made: What the finished stage wrote, as Python callers get it.
  """

  check: Callable[[Run], None]
  run: Callable[[Run], Record]
  made: Callable[[Run], Any]


STAGES = {
  "pretrain": Stage(pretrain.check, pretrain.run, pretrain.made),
  "slim": Stage(slim.check, slim.run, slim.made),
  "search": Stage(search.check, search.run, search.made),
  "finetune": Stage(finetune.check, finetune.run, finetune.made),
  "evaluate": Stage(evaluate.check, evaluate.run, evaluate.made),
  "benchmark": Stage(benchmark.check, benchmark.run, benchmark.made),
  "compare": Stage(compare.check, compare.run, compare.made),
  "visualize": Stage(visualize.check, visualize.run, visualize.made),
  "export": Stage(export.check, export.run, export.made),
}


def run_stages(config: Config, workdir: pathlib.Path, names: Sequence[str]) -> Run:
  """Runs the stages that are not finished yet; nothing begins before all of them are checked.

  Raises:
    UserError: For what a stage refuses, or if another run is using the workdir.
  """
  workdir = pathlib.Path(paths.expand(workdir))
  with owned(workdir):
    run = open_run(config, workdir, names)
    left = [name for name in names if not run.workdir.is_finished(name)]
    for name in left:
      STAGES[name].check(run)
    if left:
      run.artefacts.check_weights()
    run.workdir.begin(config, run.inputs.class_names)
    for name in names:
      if name in left:
        run.workdir.finish(name, STAGES[name].run(run))
        run = run.reread()
      else:
        logging.info("%s: finished before", name)
  return run


def run_stage(
  stage: str,
  config: Config | Mapping[str, Any],
  workdir: str | pathlib.Path = "runs/python",
) -> Any:
  """Runs one stage from Python.

  Args:
    stage: `pretrain`, `slim`, `search`, `finetune`, `evaluate`, `benchmark`, `compare`,
      `visualize` or `export`.
    config: A `Config`, or a mapping of its keys such as `default_config()`.
    workdir: Where the run is kept. Stages that build on each other share it.

  Returns:
    What the stage writes: `pretrain` and `finetune` the path of the weights, `slim` and `search`
    the `Plan`, `evaluate` and `compare` the content of `result.json`, `benchmark` that of
    `benchmark.json`, `visualize` the path of `report.html`, `export` the content of
    `manifest.json`. A finished stage is not run again.
  """
  config = config if isinstance(config, Config) else from_config_dict(config)
  return STAGES[stage].made(run_stages(config, pathlib.Path(workdir), (stage,)))
