"""Runs inside the workdir of another run."""

from collections.abc import Callable, Mapping

from vitcomp_jax.config import Config
from vitcomp_jax.records import Record
from vitcomp_jax.runs.ownership import owned
from vitcomp_jax.runs.run import Run, open_run

Stages = Mapping[str, Callable[[Run], Record]]

# Characters of names such as `diffrate[what=both]@0.5` that must not be in the path of a run.
_IN_FOLDERS = str.maketrans({"[": "(", "]": ")", "/": ":"})


def finished_child(run: Run, name: str, config: Config, stages: Stages) -> Run:
  """Returns a finished run in `compare/NAME`, resuming it if it was interrupted.

  The folder has round brackets where the name has square ones, and colons for slashes.

  Args:
    run: Parent run.
    name: Name of the child.
    config: Config of the child.
    stages: Stage functions by name; those listed in the config are run.
  """
  path = run.workdir.path / "compare" / name.translate(_IN_FOLDERS)
  with owned(path):
    child = open_run(config, path, config.stages)
    child.workdir.begin(config, child.inputs.class_names)
    for stage in config.stages:
      if not child.workdir.is_finished(stage):
        child.workdir.finish(stage, stages[stage](child))
        child = child.reread()
  return child
