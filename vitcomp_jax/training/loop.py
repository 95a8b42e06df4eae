"""The loop around the step: batches in, figures and checkpoints out, resumable anywhere."""

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from vitcomp_jax.checkpoint import Checkpointer
from vitcomp_jax.errors import UserError
from vitcomp_jax.metrics import MetricsWriter
from vitcomp_jax.training.step import StepFn, TrainState


def train(
  *,
  stage: str,
  workdir: pathlib.Path,
  state: TrainState,
  step_at: Callable[[int], StepFn],
  batches: Callable[[int], Iterator[Mapping[str, Any]]],
  steps: int,
  log_every: int,
  checkpoint_every: int,
) -> tuple[TrainState, float]:
  """Runs a stage's steps, from its last checkpoint if there is one.

  Args:
    stage: Names the checkpoints and the figures.
    workdir: Of the run.
    state: Before the first step.
    step_at: Gives the function of a step (counted from 0), from `step.make_step`.
    batches: Gives the batches from a step on; each a function of its step alone.
    steps: How many in all.
    log_every: Steps between logged figures.
    checkpoint_every: Steps between checkpoints.

  Returns:
    The state after the last step, and the seconds spent, earlier sittings included.
  """
  with Checkpointer(workdir / "checkpoints" / stage) as checkpoints:
    restored = checkpoints.restore(state)
    done, state = restored if restored else (0, state)
    with MetricsWriter(workdir, stage, done, steps) as metrics:
      iterator = batches(done)
      for step in range(done + 1, steps + 1):
        batch = next(iterator)
        step_fn = step_at(step - 1)
        state, figures = step_fn(state, {"image": batch["image"], "label": batch["label"]})
        metrics.advance()
        if step % log_every == 0 or step in (1, steps):
          figures = jax.device_get(figures)
          metrics.write(step, figures)
          if not math.isfinite(figures["loss"]):
            raise UserError(
              f"stage {stage}: the loss is {figures['loss']} at step {step}; lower the learning "
              "rate, or start from other weights."
            )
        if step % checkpoint_every == 0 or step == steps:
          checkpoints.save(step, state)
      return state, metrics.seconds
