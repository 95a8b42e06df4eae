"""The folder of a run: its config, and its finished stages."""

import dataclasses
import glob
import operator
import pathlib
import reprlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vitcomp_jax import config_parsing, multihost, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import Config
from vitcomp_jax.data import labels
from vitcomp_jax.errors import UserError
from vitcomp_jax.results import Record, environment

R = TypeVar("R", bound=Record)

# Keys that do not affect a run's outcome, and so may change when it is resumed.
_FREE = ("parallel", "profile", "data.workers", "data.on_error", "compilation_cache")
# Keys that determine the rows of a comparison; each row is measured by itself and kept.
_ROWS = ("methods", "plans", "budgets", "finetuned", "finetune_budgets")


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The folder of a run.

  Attributes:
    path: Path of the folder, which `begin` creates if missing.
  """

  path: pathlib.Path

  @property
  def config_file(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the class names that the run began with; empty if it has not begun."""
    if not self.config_file.exists():
      return ()
    return tuple(strict_json.read(self.config_file).get("class_names") or ())

  def begin(
    self, config: Config, class_names: Sequence[str], leaves_labels_out: bool = False
  ) -> None:
    """Records the config, or stages added to it since; creates the folder if missing.

    Raises:
      UserError: If the folder cannot be written, or the run began with other class names.
    """
    is_there = self.config_file.exists()
    multihost.meet("open")  # all processes must check before the first one writes the file
    if is_there:
      self._go_on(config, tuple(class_names), leaves_labels_out)
      return
    values = {
      "config": config_parsing.to_dict(config),
      "class_names": list(class_names),
      "leaves_labels_out": leaves_labels_out,
      "git_commit": _git_commit(),
    }
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      write_json(self.config_file, values | environment())
      multihost.meet("begin")
    except OSError as error:
      raise UserError(f"--workdir {self.path}: cannot be written ({error.strerror}).") from error

  def _go_on(self, config: Config, class_names: tuple[str, ...], leaves_labels_out: bool) -> None:
    if self.class_names and self.class_names != class_names:
      how = labels.differing(self.class_names, class_names)
      raise UserError(
        f"{self.path} was begun with {how}; give another --workdir, or the class folders that it "
        "was begun with."
      )
    found = strict_json.read(self.config_file)
    if found.get("leaves_labels_out", False) != leaves_labels_out:
      before, now = ("without", "with") if not leaves_labels_out else ("with", "without")
      raise UserError(
        f"{self.path} was begun {before} labels, and the class folders now are such that it would "
        f"go on {now} them; give another --workdir, or the class folders that it was begun with."
      )
    there = found["config"]
    resumed = _with_rows(there, config_parsing.to_dict(config))
    if resumed != there:  # do this first, or a run killed in between would count as finished
      self._marker("compare").unlink(missing_ok=True)
    if len(there["stages"]) < len(config.stages):
      resumed["stages"] = list(config.stages)
    if resumed != there:
      write_json(self.config_file, found | {"config": resumed})

  def has_other_rows(self, config: Config) -> bool:
    """Returns whether the comparison began with rows other than those requested now."""
    if not self.config_file.exists():
      return False
    there = strict_json.read(self.config_file)["config"]
    return _with_rows(there, config_parsing.to_dict(config)) != there

  def is_finished(self, stage: str) -> bool:
    """Returns whether a stage has finished."""
    return self._marker(stage).exists()

  def finished(self, stage: str, kind: type[R]) -> R | None:
    """Returns the result of a finished stage; None if it is not finished.

    Args:
      stage: Name of the stage.
      kind: Type of its result.

    Raises:
      UserError: If the file of the result is damaged.
    """
    return kind.read(self._marker(stage)) if self.is_finished(stage) else None

  def finish(self, stage: str, result: Record) -> None:
    """Marks a stage as finished, with its result."""
    self._marker(stage).parent.mkdir(exist_ok=True)
    result.write(self._marker(stage))
    multihost.meet(f"finish {stage}")

  def _marker(self, stage: str) -> pathlib.Path:
    return self.path / "finished" / f"{stage}.json"


def check_resumable(workdir: Workdir, config: Config, other_rows: bool = False) -> None:
  """Rejects a folder that cannot be used, or was made with another config.

  Args:
    workdir: The folder.
    config: Config of the run.
    other_rows: Whether the rows of a comparison may have changed since.
  """
  path = workdir.path
  # Orbax looks for the parts of a checkpoint by glob; if its path is a pattern, they are lost.
  absolute = str(path.absolute())
  if glob.escape(absolute) != absolute:
    raise UserError(
      f"--workdir {path}: expected a path without *, ? and [, got {absolute}; give another."
    )
  try:
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
  except OSError as error:
    raise UserError(f"--workdir {path}: cannot be read ({error.strerror}).") from error
  if workdir.config_file.name in names:
    _check_config(workdir, config, other_rows)
  elif names & {"finished", "checkpoints"}:
    raise UserError(
      f"{path} holds a run whose config.json is gone; give another --workdir, or empty it."
    )


def _with_rows(made_with: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a run's config with the rows of a comparison that are requested now."""
  before = made_with.get("compare")
  if not isinstance(before, dict):
    return dict(made_with)
  rows = {key: asked["compare"][key] for key in _ROWS}
  return {**made_with, "compare": {**before, **rows}}


def _check_config(workdir: Workdir, config: Config, other_rows: bool) -> None:
  made_with = strict_json.read(workdir.config_file).get("config")
  if not isinstance(made_with, dict):
    raise UserError(
      f"{workdir.config_file}: expected a run's config, got {reprlib.repr(made_with)}; remove it."
    )
  values = config_parsing.to_dict(config)
  # A run may be extended by further stages and then be resumed with the old config.
  made_with = _with_rows(made_with, values) if other_rows else made_with
  before = made_with.get("stages")
  if before and all(map(operator.eq, before, values["stages"])):
    made_with = made_with | {"stages": values["stages"]}
  differing = _differing_keys(made_with, values)
  if differing:
    raise UserError(
      f"{workdir.path} was made with another config ({'; '.join(differing)}); give another "
      "--workdir, or the config it was made with."
    )


def _differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
  """Returns the relevant keys that differ, each with both values."""
  lines = []
  for key in sorted(set(old) | set(new)):
    a, b = old.get(key), new.get(key)
    if path + key in _FREE:
      continue
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += _differing_keys(a, b, f"{path}{key}.")
    elif a != b:
      lines.append(f"config.{path}{key}: {a!r} there, {b!r} here")
  return lines


def _git_commit() -> str | None:
  """Returns the Git commit of the code; None if it does not run from a checkout."""
  command = ["git", "rev-parse", "HEAD"]
  try:
    result = subprocess.run(
      command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
  except OSError:
    return None
  return result.stdout.strip() or None
