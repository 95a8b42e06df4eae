"""The loop around the step: batches in, metrics and checkpoints out, resumable anywhere."""

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
  """Describes what a stage trains.

  Attributes:
    stage: Names the checkpoints and the metrics.
    state: Before the first step; it may lie anywhere.
    step_at: Gives the function of a step (counted from 0), from `step.make_step`.
    batches: Gives this process's rows of the batches from a step on; each a function of its step.
    steps: How many in all.
    log_every: Steps between logged metrics.
    checkpoint_every: Steps between checkpoints.
    schedule: The learning rate, which is logged.
    fixed: What no step changes, such as a teacher's weights.
  """

  stage: str
  state: TrainState
  step_at: Callable[[int], StepFn]
  batches: Callable[[int], Iterator[Mapping[str, Any]]]
  steps: int
  log_every: int
  checkpoint_every: int
  schedule: optax.Schedule
  fixed: Any = None


def train(
  task: Task, workdir: pathlib.Path, layout: Layout, traced: tuple[int, ...] = ()
) -> tuple[TrainState, float]:
  """Runs a stage's steps, from its last checkpoint if there is one.

  Args:
    task: What to do.
    workdir: Of the run.
    layout: On the devices.
    traced: First and last step of a profile; empty: none.

  Returns:
    The state after the last step, and the seconds spent, earlier sittings included.

  Raises:
    Preempted, KeyboardInterrupt: If the process was asked to end, or Ctrl-C was pressed; a
      checkpoint is written before.
    UserError: If the loss is not finite; what led to it is in `failure.json`. Or if the data cannot
      be read, after a checkpoint where one process does it all.
  """
  state, fixed = layout.put_state(task.state), layout.put_state(task.fixed)
  with (
    Checkpointer(workdir / "checkpoints" / task.stage) as checkpoints,
    Preemption() as preemption,
  ):
    restored = checkpoints.restore(state)
    done, state = restored if restored else (0, state)
    logging.info("%s: steps %d to %d; the first is compiled", task.stage, done + 1, task.steps)
    watch = _LossWatch(task.stage, workdir, checkpoints)
    with MetricsWriter(workdir, task.stage, done, task.steps) as writer:
      iterator, clock = task.batches(done), _Clock()
      for step in range(done + 1, task.steps + 1):
        clock.begin_input()
        try:
          batch = next(iterator)
        except UserError:  # a corrupt image, say: what was learnt is not lost with it
          # Several processes would have to save together, and the others know nothing of it.
          if jax.process_count() == 1 and step - 1 != (checkpoints.latest_step() or 0):
            watch.check()
            checkpoints.save(step - 1, state)
          raise
        clock.end_input(len(batch["label"]) * jax.process_count())
        if traced and step == traced[0]:
          jax.profiler.start_trace(str(workdir / "profile"))
        placed = layout.put_batch({k: v for k, v in batch.items() if k != "index"})
        state, metrics = task.step_at(step - 1)(state, placed, fixed)
        writer.advance()
        watch.add(step, metrics["loss"], batch["index"])
        is_last = step == task.steps
        if step % task.log_every == 0 or step == 1 or is_last:
          metrics = layout.get(metrics)
          rate = {"learning_rate": np.asarray(task.schedule(step - 1))}
          speed = clock.metrics()
          if step == 1:  # Compiling is most of it.
            speed = {"first_step_s": speed["step_s"]}
          writer.write(step, {**metrics, **rate, **speed})
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
  """Runs a task's steps without a workdir: nothing is logged, nothing kept but the last state.

  Args:
    task: To do.
    layout: On the devices.

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
  """Measures where the time of the steps goes."""

  def __init__(self) -> None:
    self._restart()

  def _restart(self) -> None:
    self._begin = time.monotonic()
    self._steps, self._images, self._waited = 0, 0, 0.0

  def begin_input(self) -> None:
    self._asked = time.monotonic()

  def end_input(self, images: int) -> None:
    self._waited += time.monotonic() - self._asked
    self._steps, self._images = self._steps + 1, self._images + images

  def metrics(self) -> dict[str, float]:
    """Means over the steps since the last call; it is called when the last step is done."""
    spent = time.monotonic() - self._begin
    found = {
      "images_per_second": self._images / spent,
      "step_s": spent / self._steps,
      "input_wait_s": self._waited / self._steps,
    }
    memory = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max((stats.get("peak_bytes_in_use", 0) for stats in memory), default=0)
    # What a CPU's device takes is the process's own.
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    self._restart()
    return found | {"peak_memory_gb": peak / 2**30}


class _LossWatch:
  """Stops a run whose loss is no longer finite, and writes down what led to it.

  A loss is looked at a step later, when it is there, so that no step waits for it.
  """

  def __init__(self, stage: str, workdir: pathlib.Path, checkpoints: Checkpointer) -> None:
    self._stage, self._workdir, self._checkpoints = stage, workdir, checkpoints
    self._open: list[tuple[int, jax.Array, np.ndarray]] = []

  def add(self, step: int, loss: jax.Array, index: np.ndarray) -> None:
    self._open.append((step, loss, index))
    if len(self._open) > 1:
      self._check(*self._open.pop(0))

  def check(self) -> None:
    """Looks at all that are left."""
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
