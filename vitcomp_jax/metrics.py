"""Writes the metrics of a run as JSON lines and TensorBoard events, and shows progress."""

import json
import logging
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import tqdm

from vitcomp_jax import multihost, strict_json
from vitcomp_jax.atomic import write_text

T = TypeVar("T")


class MetricsWriter:
  """Writes the metrics of one stage."""

  def __init__(self, workdir: pathlib.Path, stage: str, start_step: int, total_steps: int) -> None:
    """Opens the files, and drops metrics after `start_step`, which an interrupted run wrote.

    Args:
      workdir: Folder of `metrics.jsonl` and `tensorboard/`.
      stage: Name of the stage.
      start_step: Number of completed steps.
      total_steps: Number of steps in total.
    """
    self._path, self._stage, self._begin = workdir / "metrics.jsonl", stage, time.monotonic()
    self._elapsed = _drop_later(self._path, stage, start_step)
    multihost.meet("metrics")  # All processes must read the file before it grows.
    self._board = None
    if multihost.is_first():
      from tensorboardX import SummaryWriter  # slow to import

      self._board = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=start_step + 1)
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=start_step,
      desc=stage,
      unit="step",
      disable=not (multihost.is_first() and sys.stderr.isatty()),
    )

  @property
  def seconds(self) -> float:
    """Returns the seconds spent in the stage, including those logged before it was resumed."""
    return self._elapsed + time.monotonic() - self._begin

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Logs the metrics of a step.

    Args:
      step: The step, counted from 1.
      metrics: Numbers and arrays by name. An array with one element is written as a number, others
        as lists; values that are not finite are `null` in the file.
    """
    if self._board is None:
      return
    values = {key: _plain(value) for key, value in metrics.items()}
    record = {"stage": self._stage, "step": step, "time_s": round(self.seconds, 3), **values}
    with self._path.open("a") as file:
      file.write(strict_json.dumps_or_null(record) + "\n")
    for key, value in values.items():
      if isinstance(value, int | float):
        self._board.add_scalar(f"{self._stage}/{key}", value, step)
    shown = {k: f"{v:.4g}" for k, v in values.items() if isinstance(v, int | float)}
    if self._bar.disable:
      text = " ".join(f"{key} {value}" for key, value in shown.items())
      logging.info("%s step %d/%d: %s", self._stage, step, self._bar.total, text)
    else:
      self._bar.set_postfix(shown)

  def advance(self, steps: int = 1) -> None:
    """Moves the progress bar."""
    self._bar.update(steps)

  def close(self) -> None:
    self._bar.close()
    if self._board is not None:
      self._board.close()
    multihost.meet("logged")

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def read_metrics(workdir: pathlib.Path, stage: str) -> list[dict[str, Any]]:
  """Reads the metrics of a stage: one record per logged step, in order."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  return [r for r in _records(path) if r.get("stage") == stage]


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the logged records, skipping damaged lines."""
  return [r for r in map(_parse, path.read_text(errors="replace").splitlines()) if r]


def _parse(line: str) -> dict[str, Any]:
  """Parses a logged record; a truncated line gives an empty one."""
  try:
    record = json.loads(line)
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def _drop_later(path: pathlib.Path, stage: str, step: int) -> float:
  """Removes a stage's records after `step`; returns the seconds spent up to it."""
  if not path.exists():
    return 0.0
  kept = [r for r in _records(path) if r.get("stage") != stage or r.get("step", 0) <= step]
  write_text(path, "".join(strict_json.dumps_or_null(r) + "\n" for r in kept))
  return max((float(r.get("time_s", 0)) for r in kept if r.get("stage") == stage), default=0.0)


def _plain(value: Any) -> Any:
  value = value.tolist() if hasattr(value, "tolist") else value
  return value[0] if isinstance(value, list) and len(value) == 1 else value


def progress(items: Iterable[T], what: str, total: int) -> Iterable[T]:
  """Returns the items, with a progress bar if stderr is a terminal."""
  return tqdm.tqdm(
    items, desc=what, total=total, disable=not (multihost.is_first() and sys.stderr.isatty())
  )
