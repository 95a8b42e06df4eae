"""The stages of a run, one module each."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitcomp_jax import paths
from vitcomp_jax.config import Config, from_config_dict
from vitcomp_jax.ownership import owned
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
    run: Does it; returns a summary.
    made: What the finished stage wrote, as Python callers get it.
  """

  check: Callable[[Run], None]
  run: Callable[[Run], dict[str, Any]]
  made: Callable[[Run], Any]


STAGES = {
  "pretrain": Stage(pretrain.check, pretrain.pretrain, pretrain.made),
  "slim": Stage(slim.check, slim.slim, slim.made),
  "search": Stage(search.check, search.search, search.made),
  "finetune": Stage(finetune.check, finetune.finetune, finetune.made),
  "evaluate": Stage(evaluate.check, evaluate.evaluate, evaluate.made),
  "benchmark": Stage(benchmark.check, benchmark.benchmark, benchmark.made),
  "compare": Stage(compare.check, compare.compare, compare.made),
  "visualize": Stage(visualize.check, visualize.visualize, visualize.made),
  "export": Stage(export.check, export.export, export.made),
}


def run_stages(config: Config, workdir: pathlib.Path, names: Sequence[str]) -> Run:
  """Runs the stages that are not finished yet; nothing begins before all of them are checked.

  Raises:
    UserError: For what a stage refuses, or if another run is using the workdir.
  """
  workdir = pathlib.Path(paths.expand(workdir))
  with owned(workdir):
    run = open_run(config, workdir, names)
    left = [name for name in names if run.finished(name) is None]
    for name in left:
      STAGES[name].check(run)
    if left:
      run.params  # noqa: B018, weights that do not fit are refused here
    run.begin()
    for name in names:
      if name in left:
        run.finish(name, STAGES[name].run(run))
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
