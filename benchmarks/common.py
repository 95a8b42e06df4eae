"""Shared code of the comparisons with PyTorch: subjects to time, and a peer process."""

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import vitcomp_jax as vc
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.models.tokens import AttentionStats, TokenReducer, Tokens
from vitcomp_jax.parallel import Layout
from vitcomp_jax.training import loop


@dataclasses.dataclass(frozen=True)
class FirstTokens:
  """Keeps as many tokens as another reducer, but the first ones, to measure that reducer's cost."""

  like: TokenReducer

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    n, keep = tokens.x.shape[1], self.count(tokens.x.shape[1])
    if keep == n:
      return tokens
    x, origin = tokens.x[:, :keep], tokens.origin
    # XLA cannot predict these sizes, so attention has to use them as under the plan.
    first = Tokens.begin(x, tokens.num_prefix, size=1 + abs(x[..., 0]))
    return first.replace(origin=None if origin is None else origin[:, :keep])

  def count(self, n: int) -> int:
    return self.like.count(n)


def without_choice(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
  """Returns layers that keep as many tokens without choosing or merging: always the first ones."""
  return tuple(dataclasses.replace(layer, reduce=FirstTokens(layer.reduce)) for layer in layers)


def plan_counts(spec: ViTSpec, layers: Sequence[LayerSpec]) -> list[tuple[int, int]] | None:
  """Returns each layer's counts after pruning and merging; None if `torch_vit.py` cannot run them.

  It supports DiffRate plans for models without layer scale that classify CLS, their only prefix.
  """
  reducers = [layer.reduce for layer in layers]
  counts = [(r.prune_keep, r.merge_keep) for r in reducers if isinstance(r, PruneMerge)]
  pairs = zip(spec.dense_layers, counts, strict=False)
  known = tuple(dataclasses.replace(dense, reduce=PruneMerge(*pair)) for dense, pair in pairs)
  fits = known == tuple(layers) and spec.pool == "cls" and spec.num_prefix == 1
  return counts if fits and not spec.layer_scale else None


@dataclasses.dataclass
class Subject:
  """Holds a function to time, like the models from `timing.compiled`."""

  name: str
  batch: int
  time_once: Callable[[], float]
  seconds: list[float] = dataclasses.field(default_factory=list)


class SearchSteps:
  """Runs steps of a search on one batch."""

  def __init__(self, task: loop.Task, layout: Layout, batch: Mapping[str, np.ndarray]) -> None:
    self._step, self._batch = task.step_at(0), layout.put_batch(batch)
    self.state = layout.put_state(task.state)

  def time_once(self) -> float:
    """Runs a step, and returns its duration in seconds."""
    begin = time.perf_counter()
    self.state, _ = self._step(self.state, self._batch, None)
    jax.block_until_ready(self.state)
    return time.perf_counter() - begin


class Peer:
  """Runs a process that answers each line of JSON with a line of JSON."""

  def __init__(self, command: Sequence[str]) -> None:
    pipe = subprocess.PIPE
    self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

  def ask(self, *question: Any, timeout: float | None = None) -> dict[str, Any]:
    """Returns the answer to a question.

    Args:
      question: Values to send as JSON.
      timeout: Seconds to wait for the answer; None: no limit.

    Raises:
      RuntimeError: If there is no answer; standard error has the process's messages.
      TimeoutError: If the answer takes longer. The process is killed.
    """
    assert self._process.stdin and self._process.stdout
    try:
      print(json.dumps(question), file=self._process.stdin, flush=True)
      if not select.select([self._process.stdout], [], [], timeout)[0]:
        self._process.kill()
        raise TimeoutError(f"no answer within {timeout:.0f} s")
      return json.loads(self._process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError) as error:
      raise RuntimeError(f"no answer to {question!r}") from error

  def close(self) -> None:
    """Closes the input, which ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self._process.communicate()


def check_torch(python: str, option: str, modules: str = "torch, numpy") -> None:
  """Refuses a Python interpreter that cannot import PyTorch.

  Args:
    python: The interpreter.
    option: Command-line option for the interpreter, for the error message.
    modules: Modules that the interpreter must have.

  Raises:
    vc.UserError: If it cannot be run, or lacks any of the modules.
  """
  command = [python, "-c", f"import {modules}"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
      return
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
  except OSError as error:
    reason = str(error.strerror)
  raise vc.UserError(
    f"{option}: expected an interpreter that can import {modules.replace(', ', ' and ')}, got "
    f"{python} ({reason}); name another, or none to leave PyTorch out."
  )


def entry(subject: Any) -> dict[str, Any]:
  """Returns the row of a subject for tables and JSON files."""
  low, median, high = (float(s) for s in np.percentile(subject.seconds, (25, 50, 75)))
  return {
    "name": subject.name,
    "batch": subject.batch,
    "median_ms": round(1e3 * median, 3),
    "iqr_ms": round(1e3 * (high - low), 3),
    "images_per_second": round(subject.batch / median, 3),
    "timings": len(subject.seconds),
  }


def to_torch(images: np.ndarray) -> np.ndarray:
  """Transposes images [b h w 3] to [b 3 h w]."""
  return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def threads() -> int:
  """Returns the number of cores that XLA uses, which is also the number of PyTorch's threads."""
  return len(os.sched_getaffinity(0))
