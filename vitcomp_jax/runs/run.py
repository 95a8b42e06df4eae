"""What the stages of a run share."""

import dataclasses
import pathlib
from collections.abc import Sequence

from vitcomp_jax.config import Config
from vitcomp_jax.runs.artefacts import Artefacts
from vitcomp_jax.runs.class_names import ClassNames, Splits
from vitcomp_jax.runs.inputs import Inputs
from vitcomp_jax.runs.workdir import Workdir, check_resumable

_TRAINING = {"pretrain", "slim", "search", "finetune"}


@dataclasses.dataclass(frozen=True)
class Run:
  """One run in its workdir.

  Attributes:
    config: What is asked for.
    workdir: Its folder.
    inputs: The model's spec, the data, the devices and the budget.
    artefacts: The plan and the weights in force.
  """

  config: Config
  workdir: Workdir
  inputs: Inputs
  artefacts: Artefacts

  def reread(self) -> "Run":
    """Returns the run with the artefacts as they are after a stage."""
    return dataclasses.replace(self, artefacts=Artefacts(self.config, self.workdir, self.inputs))


def make_run(config: Config, path: pathlib.Path, running: Sequence[str] = ()) -> Run:
  """Makes a run of a config and a folder; nothing is read or written yet.

  Args:
    config: Of the run.
    path: Of its workdir.
    running: Stages that are run now, which the config may not name.
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
  """Opens a workdir to be resumed, or a new one, in which nothing is written yet.

  Args:
    config: Of the run.
    path: Of its workdir.
    running: Stages that are run now, which the config may not name.

  Raises:
    UserError: If another config made what is there.
  """
  check_resumable(Workdir(path), config)
  return make_run(config, path, running)
