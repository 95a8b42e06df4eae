"""The stages of a run, one module each."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitcomp_jax import paths
from vitcomp_jax.config import Config, from_config_dict
from vitcomp_jax.errors import UserError
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
  search_checks,
  slim,
  visualize,
)

RunConfig = Config | Mapping[str, Any]
Made = Any  # a plan, a path or the content of a JSON file, depending on the stage


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run.

  Attributes:
    check: Raises a `UserError` if the stage cannot run; called before any stage begins.
    run: Runs the stage and returns its result, which marks it as finished.
    made: Returns the artefact of the finished stage to Python callers.
  """

  check: Callable[[Run], None]
  run: Callable[[Run], Record]
  made: Callable[[Run], Any]


STAGES = {
  "pretrain": Stage(pretrain.check, pretrain.run, pretrain.made),
  "slim": Stage(slim.check, slim.run, slim.made),
  "search": Stage(search_checks.check, search.run, search.made),
  "finetune": Stage(finetune.check, finetune.run, finetune.made),
  "evaluate": Stage(evaluate.check, evaluate.run, evaluate.made),
  "benchmark": Stage(benchmark.check, benchmark.run, benchmark.made),
  "compare": Stage(compare.check, compare.run, compare.made),
  "visualize": Stage(visualize.check, visualize.run, visualize.made),
  "export": Stage(export.check, export.run, export.made),
}


def run_stages(config: Config, workdir: pathlib.Path, names: Sequence[str]) -> Run:
  """Runs the stages that are not finished yet, after checking all of them.

  Raises:
    UserError: If a stage rejects the config, or another run is using the workdir.
  """
  workdir = pathlib.Path(paths.expand(workdir))
  with owned(workdir):
    run = open_run(config, workdir, names)
    left = [name for name in names if not run.workdir.is_finished(name)]
    if "compare" in names and "compare" not in left and run.workdir.has_other_rows(config):
      left.append("compare")  # to measure the new rows
    for name in left:
      STAGES[name].check(run)
    if left:
      run.artefacts.check_weights()
    run.workdir.begin(config, run.inputs.class_names, run.inputs.leaves_labels_out)
    for name in names:
      if name in left:
        run.workdir.finish(name, _done(name, run))
        run = run.reread()
      else:
        logging.info("%s: finished before", name)
  return run


def run(config: RunConfig, workdir: str | os.PathLike[str] = "runs/python") -> dict[str, Made]:
  """Runs or resumes the stages of a config, as the command does.

  Args:
    config: A `Config`, or a mapping of its keys such as `default_config()`; `config.stages` lists
      the stages.
    workdir: Folder of the run.

  Returns:
    The artefact of each stage by name, as returned by `run_stage`.

  Raises:
    UserError: If a stage rejects the config, or the workdir was made with another one.

  Examples:
    >>> import tempfile
    >>> import vitcomp_jax as vc
    >>> config = vc.default_config()
    >>> config.model.variant, config.model.weights = "vit_mini_patch3_30", "bundled"
    >>> config.data.pad, config.data.eval_examples, config.evaluate.token_maps = 1, 20, 0
    >>> config.stages = ("evaluate",)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   made = vc.run(config, folder)
    >>> made["evaluate"]["examples"]
    20
  """
  config = config if isinstance(config, Config) else from_config_dict(config)
  done = run_stages(config, pathlib.Path(workdir), config.stages)
  return {name: STAGES[name].made(done) for name in config.stages}


def _done(name: str, run: Run) -> Record:
  """Runs a stage; an error due to a file in a folder's place, or vice versa, names the path."""
  try:
    return STAGES[name].run(run)
  except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
    raise UserError(
      f"stage {name}: {error.filename}: cannot be written ({error.strerror}); remove it, or give "
      "another --workdir."
    ) from error


def run_stage(
  name: str, config: RunConfig, workdir: str | os.PathLike[str] = "runs/python"
) -> Made:
  """Runs one stage.

  Args:
    name: `pretrain`, `slim`, `search`, `finetune`, `evaluate`, `benchmark`, `compare`, `visualize`
      or `export`.
    config: A `Config`, or a mapping of its keys such as `default_config()`.
    workdir: Folder of the run, shared by stages that build on each other.

  Returns:
    The artefact of the stage: for `pretrain` and `finetune` the path of the weights, for `slim` and
    `search` the `Plan`, for `evaluate` and `compare` the content of `result.json`, for `benchmark`
    that of `benchmark.json`, for `visualize` the path of `report.html`, for `export` the content of
    `manifest.json`. A finished stage is not run again.

  Raises:
    UserError: If the name is unknown, the stage rejects the config, or the workdir was made with
      another one.

  Examples:
    >>> import tempfile
    >>> import vitcomp_jax as vc
    >>> config = vc.default_config()
    >>> config.model.variant, config.model.weights = "vit_mini_patch3_30", "bundled"
    >>> config.data.pad, config.data.eval_examples, config.evaluate.token_maps = 1, 20, 0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   result = vc.run_stage("evaluate", config, folder)
    >>> [row["name"] for row in result["rows"]]
    ['dense']
  """
  if name not in STAGES:
    raise UserError(f"stage: expected one of {', '.join(STAGES)}, got {name!r}.")
  config = config if isinstance(config, Config) else from_config_dict(config)
  return STAGES[name].made(run_stages(config, pathlib.Path(workdir), (name,)))
