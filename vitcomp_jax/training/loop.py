"""Runs training steps: reads batches, writes metrics and checkpoints, and resumes at any step."""

import dataclasses
import itertools
import logging
import math
import pathlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from vitcomp_jax import multihost
from vitcomp_jax.atomic import write_json
from vitcomp_jax.checkpoint import Checkpointer
from vitcomp_jax.errors import UserError
from vitcomp_jax.metrics import MetricsWriter, progress
from vitcomp_jax.parallel import Layout
from vitcomp_jax.training.preemption import Preemption
from vitcomp_jax.training.step import StepFn, TrainState


@dataclasses.dataclass(frozen=True)
class Task:
  """Describes the training of a stage.

  Attributes:
    stage: Name of the checkpoints and metrics.
    state: State before the first step, on any device.
    step_at: Maps a step, counted from 0, to its function from `step.make_step`.
    batches: Maps a step to an iterator over this process's rows of the batches from that step on;
      each batch depends only on its step.
    steps: Total number of steps.
    log_every: Steps between logged metrics.
    checkpoint_every: Steps between checkpoints.
    schedule: Learning rate by step, for the logs.
    fixed: Arrays that no step changes, such as a teacher's weights.
  """

  stage: str
  state: TrainState
  step_at: Callable[[int], StepFn]
  batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]
  steps: int
  log_every: int
  checkpoint_every: int
  schedule: optax.Schedule
  fixed: Any = None


def train(
  task: Task, workdir: pathlib.Path, layout: Layout, traced: tuple[int, ...] = ()
) -> tuple[TrainState, float]:
  """Runs a stage's steps, starting from its last checkpoint if there is one.

  Args:
    task: The training to run.
    workdir: Folder of the run.
    layout: Layout of state and batches on the devices.
    traced: First and last step to profile; empty for no profile.

  Returns:
    The state after the last step, and the seconds spent, including those before resuming.

  Raises:
    Preempted: On SIGTERM, after a checkpoint.
    KeyboardInterrupt: On Ctrl-C, after a checkpoint.
    UserError: If the loss is not finite, after writing `failure.json`; or if the data cannot be
      read, after a checkpoint (except with several processes).
  """
  state, fixed = layout.put_state(task.state), layout.put_state(task.fixed)
  with (
    Checkpointer(workdir / "checkpoints" / task.stage) as checkpoints,
    Preemption() as preemption,
  ):
    done, state = checkpoints.restore(state) or (0, state)
    logging.info("%s: steps %d to %d; the first is compiled", task.stage, done + 1, task.steps)
    watch, clock = _LossWatch(task.stage, workdir, checkpoints), _Clock()
    with MetricsWriter(workdir, task.stage, done, task.steps) as writer:
      batches = task.batches(done)
      for step in range(done + 1, task.steps + 1):
        try:
          batch = clock.time_input(batches)
        except UserError:  # such as a corrupt image
          # Several processes would have to save together, and only one may have the error.
          if jax.process_count() == 1 and step - 1 != (checkpoints.latest_step() or 0):
            watch.check()
            checkpoints.save(step - 1, state)
          raise
        if traced and step == traced[0]:
          jax.profiler.start_trace(str(workdir / "profile"))
        placed = layout.put_batch({k: v for k, v in batch.items() if k != "index"})
        state, metrics = task.step_at(step - 1)(state, placed, fixed)
        writer.advance()
        watch.add(step, metrics["loss"], batch["index"])
        is_last = step == task.steps
        if step % task.log_every == 0 or step == 1 or is_last:
          learning_rate = np.asarray(task.schedule(step - 1))
          metrics = layout.get(metrics) | {"learning_rate": learning_rate}
          writer.write(step, metrics | clock.metrics(step == 1))
          watch.check()
        if traced and step == traced[-1]:
          jax.block_until_ready(state)
          jax.profiler.stop_trace()
        stops = preemption.reached(step)
        if step % task.checkpoint_every == 0 or is_last or stops:
          watch.check()
          checkpoints.save(step, state)
        if stops and not is_last:
          preemption.end(f"stage {task.stage} ended at step {step} of {task.steps}")
      return state, writer.seconds


def run(task: Task, layout: Layout) -> TrainState:
  """Runs a task's steps without a workdir, logs or checkpoints.

  Args:
    task: The training to run.
    layout: Layout of state and batches on the devices.

  Returns:
    The state after the last step.

  Raises:
    UserError: If the loss is not finite.
  """
  state, fixed = layout.put_state(task.state), layout.put_state(task.fixed)
  batches = progress(itertools.islice(task.batches(0), task.steps), task.stage, task.steps)
  for step, batch in enumerate(batches):
    state, metrics = task.step_at(step)(state, layout.put_batch(batch), fixed)
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
      raise UserError(
        f"{task.stage}: expected a finite loss, got {loss} at step {step + 1}; lower the learning "
        "rate, or start from other weights."
      )
  return state


class _Clock:
  """Measures the time of steps, and how much of it is spent waiting for batches."""

  def __init__(self) -> None:
    self._restart()

  def _restart(self) -> None:
    self._begin = time.monotonic()
    self._steps, self._images, self._waited = 0, 0, 0.0

  def time_input(self, batches: Iterator[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Returns the next batch, and records the time that it took."""
    begin = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - begin
    self._steps, self._images = self._steps + 1, self._images + len(batch["label"])
    return batch

  def metrics(self, is_first: bool) -> dict[str, float]:
    """Returns means over the steps since the last call, all of which must have finished.

    Args:
      is_first: Whether this is the first step, most of whose time is compilation.
    """
    spent = time.monotonic() - self._begin
    step_s, wait_s = spent / self._steps, self._waited / self._steps
    images_per_second = self._images * jax.process_count() / spent
    self._restart()
    if is_first:
      return {"first_step_s": step_s}
    return {
      "images_per_second": images_per_second,
      "step_s": step_s,
      "input_wait_s": wait_s,
      "peak_memory_gb": _peak_bytes() / 2**30,
    }


def _peak_bytes() -> int:
  """Returns the peak memory of a device or, on CPU, of the process."""
  memory = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max((stats.get("peak_bytes_in_use", 0) for stats in memory), default=0)
  return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


class _LossWatch:
  """Raises an error if the loss is not finite, and writes the step and the batch to a file.

  Each loss is checked one step later, so that no step waits for it.
  """

  def __init__(self, stage: str, workdir: pathlib.Path, checkpoints: Checkpointer) -> None:
    self._stage, self._workdir, self._checkpoints = stage, workdir, checkpoints
    self._open: list[tuple[int, jax.Array, np.ndarray]] = []

  def add(self, step: int, loss: jax.Array, index: np.ndarray) -> None:
    self._open.append((step, loss, index))
    if len(self._open) > 1:
      self._check(*self._open.pop(0))

  def check(self) -> None:
    """Checks all pending losses."""
    while self._open:
      self._check(*self._open.pop(0))

  def _check(self, step: int, loss: jax.Array, index: np.ndarray) -> None:
    value = float(loss)
    if math.isfinite(value):
      return
    last = self._checkpoints.latest_step()
    index = multihost.gathered(index)
    path = self._workdir / "failure.json"
    what = {"stage": self._stage, "step": step, "loss": str(value), "checkpoint": last}
    write_json(path, what | {"indices": index.tolist()})
    where = f"checkpoint {last}" if last else "the start"
    raise UserError(
      f"stage {self._stage}: expected a finite loss, got {value} at step {step}; lower the "
      f"learning rate, or start from other weights. The last good state is {where}; the batch is "
      f"in {path}."
    )
