"""Times compiled models in turns."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.weights.loading import Params


class Timed(Protocol):
  """Describes anything that can be timed.

  Attributes:
    seconds: Timings so far, in seconds.
  """

  seconds: list[float]

  def time_once(self) -> float:
    """Runs once, and returns the seconds that it took."""
    ...


@dataclasses.dataclass
class Subject:
  """Holds a compiled model for one batch size, and its timings.

  Attributes:
    name: Name of the model.
    batch: Batch size.
    forward: The compiled forward pass, of weights and images.
    params: The weights.
    images: The input, f32[b h w 3].
    compile_s: Seconds that compilation took.
    first_s: Seconds that the first run took.
    peak_bytes: Memory of the program, with arguments and results.
    seconds: Timings of a forward pass, in seconds.
  """

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
    """Runs a forward pass, and returns the seconds that it took."""
    begin = time.perf_counter()
    self.forward(self.params, self.images).block_until_ready()
    return time.perf_counter() - begin


def compiled(name: str, model: Backbone, params: Params, batch: int) -> Subject:
  """Compiles a model for a batch size, and runs it once on noise.

  Args:
    name: Name of the model, for logs and tables.
    model: The model.
    params: Weights of the model.
    batch: Batch size.
  """
  subject = prepared(name, model, jax.device_put(params), jnp.asarray(noise(model.spec, batch)))
  subject.first_s = subject.time_once()
  return subject


def prepared(name: str, model: Backbone, params: Params, images: jax.Array) -> Subject:
  """Compiles a model for a batch, and does not run it.

  Args:
    name: Name of the model, for logs and tables.
    model: The model.
    params: Weights of the model, on the device.
    images: The batch f[b h w 3], on the device.

  Returns:
    The program to time, whose `first_s` is still 0.
  """

  def forward(params: Params, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images)

  begin, batch = time.perf_counter(), images.shape[0]
  program = jax.jit(forward).lower(params, images).compile()
  compile_s = time.perf_counter() - begin
  memory = program.memory_analysis()
  assert memory is not None
  peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  logging.info("%s, batch %d: compiled in %.1f s", name, batch, compile_s)
  return Subject(name, batch, program, params, images, compile_s, 0.0, peak)


def noise(spec: ViTSpec, batch: int) -> np.ndarray:
  """Draws normal noise as images, f32[b h w 3]; a smaller batch is a prefix of a larger one."""
  return np.random.default_rng(0).standard_normal((batch, *spec.image_shape), np.float32)


def take_turns(subjects: Sequence[Timed], seconds: float, rounds: int) -> None:
  """Times several subjects in rounds, so that drift affects all of them alike.

  Args:
    subjects: Subjects to time; their timings are appended.
    seconds: Total time for each subject; each is run at least three times a round.
    rounds: Number of rounds.
  """
  for subject in subjects:
    subject.time_once()  # another warm-up, after the one on compilation
  for _ in range(rounds):
    for subject in subjects:
      begin, count = time.perf_counter(), 0
      while count < 3 or time.perf_counter() - begin < seconds / rounds:
        subject.seconds.append(subject.time_once())
        count += 1
