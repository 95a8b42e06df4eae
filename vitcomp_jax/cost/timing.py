"""Timing of compiled models that take turns."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.weights.loading import Params


@dataclasses.dataclass
class Subject:
  """One model at one batch size, compiled."""

  name: str
  batch: int
  forward: Callable[[Params, jax.Array], jax.Array]
  params: Params
  images: jax.Array
  compile_s: float
  first_s: float
  peak_bytes: int
  seconds: list[float] = dataclasses.field(default_factory=list)

  def time_once(self) -> float:
    begin = time.perf_counter()
    self.forward(self.params, self.images).block_until_ready()
    return time.perf_counter() - begin


def compiled(name: str, model: Backbone, params: Params, batch: int) -> Subject:
  """Compiles a model for a batch size, and runs it once on noise.

  Args:
    name: Of the model.
    model: The model.
    params: Its weights.
    batch: Images at once.
  """
  arguments = jax.device_put(params), jnp.asarray(noise(model.spec, batch))

  def forward(params: Params, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images)

  begin = time.perf_counter()
  program = jax.jit(forward).lower(*arguments).compile()
  compile_s = time.perf_counter() - begin
  program(*arguments).block_until_ready()
  first_s = time.perf_counter() - begin - compile_s
  memory = program.memory_analysis()
  assert memory is not None
  peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  logging.info("%s, batch %d: compiled in %.1f s", name, batch, compile_s)
  return Subject(name, batch, program, *arguments, compile_s, first_s, peak)


def noise(spec: ViTSpec, batch: int) -> np.ndarray:
  """Normal noise as images, f32[b h w 3]; a smaller batch is the start of a larger one."""
  return np.random.default_rng(0).standard_normal((batch, *spec.image_size, 3), np.float32)


def take_turns(subjects: Sequence[Any], seconds: float, rounds: int) -> None:
  """Times everything in rounds, so that drift hits all alike.

  Args:
    subjects: What has `time_once` and a list `seconds`.
    seconds: That each is given in all, at least three times a round.
    rounds: How many.
  """
  for subject in subjects:
    subject.time_once()  # a warm-up besides the one after compiling
  for _ in range(rounds):
    for subject in subjects:
      begin, count = time.perf_counter(), 0
      while count < 3 or time.perf_counter() - begin < seconds / rounds:
        subject.seconds.append(subject.time_once())
        count += 1
