"""Measures the latency table of a model on this device, from which a search predicts latency.

It times stacks of layers, compiled by JAX or exported to ONNX and run by ONNX Runtime.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import platform
import statistics
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vitcomp_jax import multihost, onnx_conversion, strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.cost import macs, timing
from vitcomp_jax.cost.cost_models import Latency, never_falling, parse_latency
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, TokenReducer, Tokens
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.weights import loading

# Makes the reduction of a layer from its token counts after pruning and after merging.
Reduction = Callable[[int, int], TokenReducer]

_COUNTS = 11  # token counts in the table
_DEPTH = 4  # layers timed as one program, to share the overhead of a call
_REMOVED = 24  # a layer timed with its reduction prunes and merges one token in this many
_ROUNDS, _SECONDS = 5, 1.0  # rounds of timing, and minimum time for each program


@dataclasses.dataclass(frozen=True)
class _Resize:
  """Repeats or drops tokens to get the number of tokens to time.

  Attributes:
    num_tokens: Number of tokens afterwards.
  """

  num_tokens: int

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    del stats
    x, size, origin = tokens.x, tokens.sizes, tokens.origin
    if x.shape[1] != self.num_tokens:
      # Otherwise XLA would skip work on dropped tokens and share it between equal ones.
      x, size = jax.lax.optimization_barrier((x, size))
      times = -(-self.num_tokens // x.shape[1])
      x, size = (jnp.concatenate([y] * times, axis=1)[:, : self.num_tokens] for y in (x, size))
    resized = Tokens.begin(x, tokens.num_prefix, size, tokens.probe)
    if origin is None:
      return resized
    # Positions are looked up by origin from here on, as after any reduction.
    origin = jnp.resize(origin, (x.shape[0], self.num_tokens))
    return resized.replace(origin=origin, is_in_order=False)

  def count(self, n: int) -> int:
    del n
    return self.num_tokens


def check(spec: ViTSpec, runtime: str, key: str) -> None:
  """Rejects models and runtimes for which no table can be measured.

  Args:
    spec: Spec of the model.
    runtime: Runtime that runs the model.
    key: Name of the budget, for error messages.

  Raises:
    UserError: If the runtime does not exist, is not installed, or cannot run the model.
  """
  spec.check_plain(key)
  if runtime not in timing.RUNTIMES:
    raise UserError(f"runtime: expected {' or '.join(timing.RUNTIMES)}, got {runtime!r}.")
  if runtime == "onnxruntime":
    onnx_conversion.check(spec.dtype)


def table(
  spec: ViTSpec,
  batch: int,
  reduce: Reduction,
  cache: pathlib.Path | None,
  runtime: str = "jax",
) -> Latency:
  """Returns the latency table of a model on this device, from the cache if it is there.

  Args:
    spec: Spec of the model.
    batch: Batch size.
    reduce: Makes a reduction from the token counts after pruning and after merging.
    cache: Folder of measured tables; None for no cache.
    runtime: Runtime that runs the model, one of `timing.RUNTIMES`.

  Raises:
    UserError: If the cached table is damaged.
  """
  about = {
    "runtime": runtime,
    "device": device_name(runtime),
    "batch": batch,
    "model": repr(spec),
    "layer": repr(spec.dense_layers[0]),
    "reduction": repr(reduce(2, 1)),
    "jax": jax.__version__,
  }
  if runtime == "onnxruntime":
    about |= onnx_conversion.versions()
  else:
    about["xla_flags"] = os.environ.get("XLA_FLAGS", "")
  digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
  path = cache / f"{spec.name}-batch{batch}-{runtime}-{digest}.json" if cache else None
  if path and path.exists():
    found = read(path, runtime)
  else:
    what = spec.name, batch, runtime
    logging.info("measuring the latency of %s, batch %d, by %s, a few minutes", *what)
    subjects = programs(spec, batch, reduce, runtime)
    timing.take_turns(list(subjects.values()), _SECONDS, _ROUNDS)
    found = dataclasses.replace(tabulate(spec, subjects, reduce), about=about)
    if path:
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json(path, found.to_json())
  # Several processes, each with its own device, use the same table.
  fixed = (found.fixed_ms,) * len(found.counts)
  shared = np.array([found.attention_ms, found.reduction_ms, found.mlp_ms, fixed])
  attention, reduction, mlp, fixed = map(tuple, multihost.from_first(shared).tolist())
  return Latency(found.counts, attention, reduction, mlp, fixed[0], about)


def read(path: pathlib.Path, runtime: str) -> Latency:
  """Reads the latency table of a runtime from its file.

  Raises:
    UserError: If the file cannot be read, holds no table, or holds one of another runtime.
  """
  try:
    values = strict_json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); remove it to measure anew.") from error
  found = parse_latency(values, str(path))
  if found.runtime != runtime:
    raise UserError(
      f"{path}: expected a table of {runtime}, got one of {found.runtime}; remove it to measure "
      "anew."
    )
  return found


def device_name(runtime: str = "jax") -> str:
  """Returns the name of a runtime's device: the accelerator, or the CPU and its number of cores."""
  kind = jax.devices()[0].device_kind
  if runtime == "jax" and jax.default_backend() != "cpu":
    return kind
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{next(iter(names), platform.processor() or kind)}, {cores} cores"


def programs(
  spec: ViTSpec, batch: int, reduce: Reduction, runtime: str = "jax"
) -> dict[tuple[str, int], timing.Subject]:
  """Compiles the short stacks of layers that are timed for a table.

  Args:
    spec: Spec of the model.
    batch: Batch size.
    reduce: Makes a reduction from the token counts after pruning and after merging.
    runtime: Runtime that runs them, one of `timing.RUNTIMES`.

  Returns:
    The programs by kind and token count. The kinds are `none`, without layers; `whole`, complete
    layers; `attention`, layers whose MLPs see one token; and `reduction`, layers that prune and
    merge.
  """
  short = dataclasses.replace(spec, depth=_DEPTH)
  params = loading.load_params(short, short.dense_layers, None)
  found = {}
  for (kind, n), layers in _stacks(spec, reduce).items():
    model = ViT(short, layers)
    found[kind, n] = timing.compiled(f"{kind} of {n} tokens", model, params, batch, runtime)
  return found


def tabulate(
  spec: ViTSpec, subjects: Mapping[tuple[str, int], timing.Subject], reduce: Reduction
) -> Latency:
  """Computes the table from the median latencies of the timed programs.

  Args:
    spec: Spec of the model.
    subjects: The timed programs from `programs`.
    reduce: Makes reductions, as for `programs`.
  """
  ms = {key: 1e3 * statistics.median(subject.seconds) for key, subject in subjects.items()}
  fixed, counts = ms["none", 0], _counts(spec)

  def per_layer(kind: str) -> np.ndarray:
    return never_falling(np.array([ms[kind, n] - fixed for n in counts]) / _DEPTH)

  whole, attention = per_layer("whole"), per_layer("attention")
  mlp, zeros = never_falling(whole - attention), (0.0,) * len(counts)
  without = Latency(tuple(counts), tuple(attention.tolist()), zeros, tuple(mlp.tolist()), fixed, {})
  at, left = [0.0], [0.0]  # The remaining latency of a stack is that of its reductions.
  for (kind, n), layers in _stacks(spec, reduce).items():
    if kind == "reduction":
      passed = macs.static_counts(spec, layers)
      at.append(float(np.mean([entered for entered, _ in passed])))
      left.append((ms[kind, n] - without.count(spec, layers, passed)) / _DEPTH)
  reduction = np.interp(counts, at, never_falling(np.array(left)))
  return dataclasses.replace(without, reduction_ms=tuple(reduction.tolist()))


def _counts(spec: ViTSpec) -> list[int]:
  """Returns the token counts of a table, starting with the fewest that a plan can keep."""
  places = np.linspace(spec.num_prefix + 1, spec.num_tokens, _COUNTS)
  return np.unique(places.round().astype(int)).tolist()


def _stacks(spec: ViTSpec, reduce: Reduction) -> dict[tuple[str, int], tuple[LayerSpec, ...]]:
  """Returns the layers of each timed program, by kind and token count."""
  base = spec.dense_layers[0]
  stacks: dict[tuple[str, int], tuple[LayerSpec, ...]] = {("none", 0): ()}
  for n in _counts(spec):
    whole = dataclasses.replace(base, select=_Resize(n))
    stacks["whole", n] = (whole,) * _DEPTH
    stacks["attention", n] = (dataclasses.replace(whole, reduce=_Resize(1)),) * _DEPTH
    kept = [n - i * max(1, n // _REMOVED) for i in range(1, 2 * _DEPTH + 1)]
    if kept[-1] > spec.num_prefix:
      pairs = zip(kept[::2], kept[1::2], strict=True)
      first = (whole,) + (base,) * (_DEPTH - 1)
      stacks["reduction", n] = tuple(
        dataclasses.replace(layer, reduce=reduce(*pair))
        for layer, pair in zip(first, pairs, strict=True)
      )
  return stacks
