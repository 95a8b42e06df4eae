"""Times compiled models, taking turns between them."""

import dataclasses
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from vitcomp_jax import exported, onnx_conversion
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import portable
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.weights.loading import Params

Run = Callable[[], Any]
Images = np.ndarray | jax.Array


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
    runtime: Runtime that runs it, one of `RUNTIMES`.
    run: Runs a forward pass to completion, and returns the outputs.
    compile_s: Seconds that compilation took.
    first_s: Seconds that the first run took.
    peak_bytes: Memory of the program, including arguments and results; None if unknown.
    seconds: Timings of a forward pass, in seconds.
  """

  name: str
  batch: int
  runtime: str
  run: Run
  compile_s: float
  first_s: float
  peak_bytes: int | None
  seconds: list[float] = dataclasses.field(default_factory=list)

  def time_once(self) -> float:
    """Runs a forward pass, and returns the seconds that it took."""
    begin = time.perf_counter()
    self.run()
    return time.perf_counter() - begin


def compiled(
  name: str, model: Backbone, params: Params, batch: int, runtime: str = "jax"
) -> Subject:
  """Compiles a model for a batch size, and runs it once on noise.

  Args:
    name: Name of the model, for logs and tables.
    model: The model.
    params: Weights of the model.
    batch: Batch size.
    runtime: Runtime that runs it, one of `RUNTIMES`.
  """
  subject = prepared(name, model, params, noise(model.spec, batch), runtime)
  subject.first_s = subject.time_once()
  return subject


def prepared(
  name: str,
  model: Backbone,
  params: Params,
  images: Images,
  runtime: str = "jax",
) -> Subject:
  """Compiles a model for a batch, but does not run it.

  Args:
    name: Name of the model, for logs and tables.
    model: The model.
    params: Weights of the model.
    images: The batch, f[b h w 3].
    runtime: Runtime that runs it, one of `RUNTIMES`.

  Returns:
    The program to time, whose `first_s` is still 0.
  """
  begin, batch = time.perf_counter(), images.shape[0]
  run, peak = RUNTIMES[runtime](model, params, images)
  compile_s = time.perf_counter() - begin
  logging.info("%s, batch %d: compiled in %.1f s", name, batch, compile_s)
  return Subject(name, batch, runtime, run, compile_s, 0.0, peak)


def _compiled_by_jax(model: Backbone, params: Params, images: Images) -> tuple[Run, int]:
  """Returns the program on this device, and its memory in bytes."""
  arguments = jax.device_put(params), jnp.asarray(images)

  def forward(params: Params, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images)

  program = jax.jit(forward).lower(*arguments).compile()
  memory = program.memory_analysis()
  assert memory is not None
  peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  return lambda: program(*arguments).block_until_ready(), peak


def _loaded_by_onnxruntime(model: Backbone, params: Params, images: Images) -> tuple[Run, None]:
  """Returns the program on the CPU, loaded from the file that an export would write."""

  def forward(images: jax.Array) -> jax.Array:
    return portable(model).apply({"params": params}, images)

  (b,) = jax_export.symbolic_shape("b")  # as in exported files
  shape = jax.ShapeDtypeStruct((b, *model.spec.image_shape), images.dtype)
  made = onnx_conversion.convert(forward, shape, "outputs")
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "model.onnx")
    file.write_bytes(made.SerializeToString())
    call = exported.RUNNERS["onnx"](file)
  pixels = np.asarray(images)
  return lambda: call(pixels), None


RUNTIMES: dict[str, Callable[[Backbone, Params, Images], tuple[Run, int | None]]] = {
  "jax": _compiled_by_jax,
  "onnxruntime": _loaded_by_onnxruntime,
}


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
    subject.time_once()  # another warm-up, after the one at compilation
  for _ in range(rounds):
    for subject in subjects:
      begin, count = time.perf_counter(), 0
      while count < 3 or time.perf_counter() - begin < seconds / rounds:
        subject.seconds.append(subject.time_once())
        count += 1
