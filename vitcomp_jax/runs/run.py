"""A run: the state that its stages share."""

import dataclasses
import pathlib
from collections.abc import Sequence

from vitcomp_jax import strict_json
from vitcomp_jax.config import Config, from_config_dict
from vitcomp_jax.errors import UserError
from vitcomp_jax.runs.artefacts import Artefacts
from vitcomp_jax.runs.class_names import ClassNames, Splits
from vitcomp_jax.runs.inputs import Inputs
from vitcomp_jax.runs.workdir import Workdir, check_resumable

_TRAINING = {"pretrain", "slim", "search", "finetune"}


@dataclasses.dataclass(frozen=True)
class Run:
  """One run in its workdir.

  Attributes:
    config: Config of the run.
    workdir: Folder of the run.
    inputs: The model's spec, the data, the devices and the budget.
    artefacts: The current plan and weights.
  """

  config: Config
  workdir: Workdir
  inputs: Inputs
  artefacts: Artefacts

  def reread(self) -> "Run":
    """Returns the run with its artefacts reread after a stage."""
    return dataclasses.replace(self, artefacts=Artefacts(self.config, self.workdir, self.inputs))


def make_run(config: Config, path: pathlib.Path, running: Sequence[str] = ()) -> Run:
  """Makes a run from a config and a folder; nothing is written yet.

  Args:
    config: Config of the run.
    path: Path of the workdir.
    running: Stages to run now in addition to the config's.
  """
  workdir, stages = Workdir(path), {*config.stages, *running}
  trains_head = "pretrain" in stages or workdir.is_finished("pretrain")
  names = ClassNames(
    Splits(config.data, trains=bool(_TRAINING & stages)),
    recorded=workdir.class_names,
    head_is_new=trains_head or config.model.weights is None,
  )
  inputs = Inputs(config, path, names)
  return Run(config, workdir, inputs, Artefacts(config, workdir, inputs))


def open_run(config: Config, path: pathlib.Path, running: Sequence[str] = ()) -> Run:
  """Opens a workdir to resume, or a new one; nothing is written yet.

  Args:
    config: Config of the run.
    path: Path of the workdir.
    running: Stages to run now in addition to the config's.

  Raises:
    UserError: If the workdir was made with another config, except for the rows of a comparison.
  """
  check_resumable(Workdir(path), config, other_rows="compare" in running)
  return make_run(config, path, running)


def finished_run(path: pathlib.Path, stages: Sequence[str] = ()) -> Run:
  """Opens the workdir of a finished run.

  Args:
    path: Path of the workdir.
    stages: Stages that have to be finished; empty for those of the run's config.

  Raises:
    UserError: If it is not the workdir of a run, or one of the stages has not finished.
  """
  file = path / "config.json"
  if not file.is_file():
    raise UserError(f"{path}: expected the workdir of a run, got no config.json in it.")
  config = strict_json.read(file).get("config")
  if not isinstance(config, dict):
    raise UserError(f"{file}: expected a run's config, got none.")
  run = make_run(from_config_dict(config), path)
  left = [stage for stage in stages or run.config.stages if not run.workdir.is_finished(stage)]
  if left:
    raise UserError(f"{path}: expected a finished run, got no end of {left[0]}; run it to its end.")
  return run
