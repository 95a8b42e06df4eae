"""Compares the speed of vitcomp_jax and PyTorch on a GPU or TPU, in a few minutes.

  python benchmarks/accelerator.py [--out FOLDER] [--minutes 8] [--torch PYTHON] [--scale tiny]

Weights and images are random; nothing is downloaded. First, the outputs of all implementations are
compared. Then the parts are measured, most important first. The rows of a part are timed in turn,
and medians are compared. Anything that runs out of time or memory is skipped, and listed with the
reason. See docs/performance.md.
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

# Otherwise JAX reserves most of the memory at once, and leaves none for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from accelerator_cases import KINDS, TORCH, Check, Part, Subjects, checks, forms, more_parts, parts
from accelerator_report import markdown, ratios
from common import Peer, Subject, check_torch, entry, to_torch

import vitcomp_jax as vc
from vitcomp_jax.atomic import write_json, write_text
from vitcomp_jax.cost import timing
from vitcomp_jax.paths import expand
from vitcomp_jax.results import environment
from vitcomp_jax.weights.timm_names import to_timm

BATCHES = {"full": (1, 32, 256), "tiny": (1, 2, 3)}
_SECONDS = {"full": 2.0, "tiny": 0.01}  # of timing for each row
_ROUNDS = 4
_LONGEST = 0.25  # share of the total time after which no further rows of a part are prepared
_LEAST = 20.0  # seconds that must remain to begin a part


@dataclasses.dataclass
class TorchSide:
  """Runs PyTorch's process, and restarts it after it has been ended.

  Attributes:
    python: Interpreter with PyTorch and timm; None: no PyTorch.
    version: PyTorch's version, known after the first question.
  """

  python: str | None
  version: str | None = None
  _peer: Peer | None = None

  def ask(self, *question: Any, timeout: float = 120.0) -> dict[str, Any]:
    """Returns the answer of `torch_models.Side`.

    Raises:
      RuntimeError: If the answer is an error, or the process has ended.
      TimeoutError: If it takes longer than `timeout` seconds.
    """
    try:
      if self._peer is None:
        assert self.python
        script = pathlib.Path(__file__).with_name("torch_models.py")
        self._peer = Peer([self.python, str(script)])
        self.version = self._peer.ask({}, timeout=timeout)["version"]
      answer = self._peer.ask(*question, timeout=timeout)
    except (RuntimeError, TimeoutError):
      self.close()
      raise
    if "error" in answer:
      raise RuntimeError(answer["error"])
    return answer

  def forget(self) -> None:
    """Frees the memory of PyTorch's computations."""
    if self._peer:
      self.ask("forget")

  def close(self) -> None:
    """Ends the process."""
    if self._peer:
      self._peer.close()
    self._peer = None

  def logits(self, subjects: Subjects, images: np.ndarray, way: str) -> np.ndarray:
    """Returns PyTorch's logits for images f32[b h w 3] with the weights of our model."""
    weights = {f"weights.{name}": value for name, value in to_timm(subjects.params).items()}
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
      np.savez(file.name, images=to_torch(images), **weights)
      case = {"way": way, "batch": len(images), "dtype": "float32", "arrays": file.name}
      return np.array(self.ask("prepare", subjects.in_timm() | case)["outputs"])


class Measuring:
  """Measures parts until the time is up, and writes the results after each of them.

  Attributes:
    result: Content of the JSON file.
  """

  def __init__(
    self, out: pathlib.Path, minutes: float, scale: str, torch: TorchSide, begin: float
  ) -> None:
    """Prepares the results.

    Args:
      out: Folder of the results.
      minutes: Total time.
      scale: One of `BATCHES`.
      torch: PyTorch's side.
      begin: Reading of the monotonic clock at the start.
    """
    self._out, self._scale, self._torch = out, scale, torch
    self._all = 60 * minutes
    self._end = begin + self._all
    self._pool = futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    self._subjects: tuple[str, Subjects] | None = None
    lists: dict[str, Any] = {name: [] for name in ("checks", "rows", "ratios", "skipped")}
    self.result = {"about": environment() | {"scale": scale, "minutes": minutes}, **lists}

  def run(self) -> bool:
    """Measures as many parts as time allows, and returns whether all outputs agreed."""
    platform, is_tiny = jax.default_backend(), self._scale == "tiny"
    if self._torch.python is None:
      self._skip("all", "torch", "no interpreter with PyTorch and timm; name one by --torch")
    if platform != "gpu":
      self._skip("all", "cudnn", f"the kernel is for NVIDIA's GPUs, this is a {platform}")
    from_torch = self._torch.logits if self._torch.python else None
    named = {check.name: check for check in checks(platform, is_tiny, from_torch)}
    self.result["checks"] = self._all_that_work("checks", named, Check.result)
    batches = BATCHES[self._scale]
    for part in parts(batches) + ([] if is_tiny else more_parts(batches)):
      if self._left() < _LEAST:
        self._skip(str(part), "all", "no time left")
        continue
      try:
        self._measure(part)
      except Exception as error:  # a part that fails must not prevent the others
        self._skip(str(part), "the rest", _reason(error))
      self.result["ratios"] = ratios(self.result["rows"])
      self._write()
    self._torch.close()
    agreed = [check["name"] for check in self.result["checks"] if check["agrees"]]
    return agreed == list(named)

  def _left(self) -> float:
    return self._end - time.monotonic()

  def _measure(self, part: Part) -> None:
    """Prepares the rows of a part, times them in turn, and adds them to the results."""
    deadline = time.monotonic() + min(self._left(), _LONGEST * self._all)
    if self._subjects is None or self._subjects[0] != part.model:
      self._subjects = None  # first frees the memory of the previous model
      self._subjects = part.model, Subjects(part.model, self._scale == "tiny")
    subjects = self._subjects[1]
    rows = self._begun(part, subjects)
    made = self._all_that_work(str(part), rows, lambda begun: begun(deadline - time.monotonic()))
    # Only now: PyTorch's process may have ended in the meantime, or memory may not suffice.
    run = {subject.name: subject for subject in made}
    timed = self._all_that_work(str(part), run, _run_once)
    seconds = min(_SECONDS[self._scale], max(self._left(), 0) / max(len(timed), 1))
    try:
      timing.take_turns(timed, seconds, _ROUNDS)
    finally:
      for subject in timed:
        if subject.seconds:
          self.result["rows"].append(self._row(part, subjects, subject))
      self._torch.forget()

  def _all_that_work(
    self, part: str, rows: Mapping[str, Any], step: Callable[[Any], Any]
  ) -> list[Any]:
    """Returns a step's results for all rows for which it succeeds, and records the others."""
    found = []
    for name, row in rows.items():
      try:
        found.append(step(row))
      except Exception as error:
        self._skip(part, name, _reason(error))
    return found

  def _begun(self, part: Part, subjects: Subjects) -> dict[str, Callable[[float], Any]]:
    """Starts compiling; returns a function per row that waits for the row, given a time limit.

    Compilation takes longer than timing, so all of our rows are compiled at the same time.
    PyTorch's rows are prepared one after the other.
    """
    params, images = subjects.weights(part.dtype), subjects.images(part.batch, part.dtype)
    here = forms(part.dtype, jax.default_backend())
    made: dict[str, Callable[[float], Any]] = {}
    for what in ("dense", *KINDS[part.kind]):
      for form in here if what in ("dense", "plan") and part.kind == "speed" else here[:1]:
        if what == "search":
          made["search xla"] = functools.partial(_search, part, subjects)
          continue
        name, model = f"{what} {form}", subjects.model(what, form, part.dtype)
        future = self._pool.submit(timing.prepared, name, model, params, images)
        made[name] = functools.partial(_result, future)
    if part.kind == "speed" and self._torch.python:
      case = subjects.in_timm() | {"batch": part.batch, "dtype": part.dtype, "arrays": None}
      for way in TORCH if case["plan"] else TORCH[:-1]:
        made[f"torch {way}"] = functools.partial(self._from_torch, case | {"way": way})
    return made

  def _from_torch(self, case: dict[str, Any], left: float) -> Subject:
    way = case["way"]
    if left <= 0:
      raise TimeoutError
    self._torch.ask("prepare", case, timeout=left)
    ask = self._torch.ask
    return Subject(f"torch {way}", case["batch"], lambda: ask("time", way)["seconds"])

  def _row(self, part: Part, subjects: Subjects, subject: Any) -> dict[str, Any]:
    what = subject.name.removeprefix("torch ").rsplit(" ", 1)[0]
    row = {"part": str(part), **dataclasses.asdict(part), **entry(subject)}
    if what != "search":
      row["gmacs"] = round(subjects.gmacs(subjects.layers(what)), 3)
    if isinstance(subject, timing.Subject):
      row |= {"compile_s": round(subject.compile_s, 2), "peak_bytes": subject.peak_bytes}
    return row

  def _skip(self, part: str, name: str, why: str) -> None:
    self.result["skipped"].append({"part": part, "name": name, "why": why})
    print(f"left out: {part}: {name}: {why}", flush=True)
    self._write()

  def _write(self) -> None:
    self.result["about"]["versions"]["torch"] = self._torch.version
    write_json(self._out / "accelerator.json", self.result)
    write_text(self._out / "accelerator.md", markdown(self.result))


def _run_once(subject: Any) -> Any:
  subject.time_once()
  return subject


def _result(future: futures.Future[Any], left: float) -> Any:
  try:
    return future.result(max(left, 0))
  finally:
    future.cancel()  # if it has not started


def _search(part: Part, subjects: Subjects, left: float) -> Subject:
  """Prepares the steps of a search; the first one compiles and cannot be interrupted."""
  if left <= 0:
    raise TimeoutError
  steps = subjects.search(part.batch, part.dtype, "xla")
  return Subject("search xla", part.batch, steps.time_once)


def _reason(error: Exception) -> str:
  """Returns an error as one line."""
  if isinstance(error, TimeoutError):
    return "not ready at the part's deadline"
  return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _torch_python(asked: str | None) -> str | None:
  """Returns an interpreter with PyTorch and timm: the requested one, this one, or None."""
  if asked == "none":
    return None
  python = expand(asked or sys.executable)
  try:
    check_torch(python, "--torch", "torch, timm")
  except vc.UserError:
    if asked:
      raise
    return None
  return python


def _make(folder: pathlib.Path) -> None:
  """Creates a folder if it does not exist."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise vc.UserError(
      f"--out: expected a folder to write to, got {folder} ({error.strerror}); name another."
    ) from error


def main(argv: Sequence[str]) -> int:
  """Runs the benchmark; returns 0, or 1 if some outputs disagree, or 2 for invalid options."""
  begin = time.monotonic()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--out", type=pathlib.Path, default=".", help="folder to write the results to"
  )
  parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it")
  parser.add_argument("--scale", choices=tuple(BATCHES), default="full", help="tiny: for a test")
  parser.add_argument("--torch", help="interpreter with PyTorch and timm; none: no PyTorch")
  known = parser.parse_args(argv)
  out = pathlib.Path(expand(known.out))
  try:
    if not 0 < known.minutes < math.inf:
      raise vc.UserError(f"--minutes: expected a number above 0, got {known.minutes}.")
    torch = TorchSide(_torch_python(known.torch))
    _make(out)
  except vc.UserError as error:
    print(f"accelerator: {error}", file=sys.stderr)
    return 2
  measuring = Measuring(out, known.minutes, known.scale, torch, begin)
  agreed = measuring.run()
  print(markdown(measuring.result))
  if not agreed:
    print("accelerator: some outputs do not agree, see the checks.", file=sys.stderr)
  return 0 if agreed else 1


if __name__ == "__main__":
  status = main(sys.argv[1:])
  sys.stdout.flush()
  os._exit(status)  # does not wait for compilations that passed their deadline
