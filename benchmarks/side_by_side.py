"""Times vitcomp_jax beside PyTorch on a CPU: forward passes, plans and search steps.

  python benchmarks/side_by_side.py [--torch-python PATH] [--json FILE] [--only dense,plan]

PyTorch runs in a process of its own (`torch_vit.py`), with as many threads and the same random
weights and images; before anything is timed, its outputs have to be ours. All take turns, so that
what else the machine does hits all alike; medians are compared. Linux; docs/performance.md says
more.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import vitcomp_jax as vc
from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import timing
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.tokens import AttentionStats, TokenReducer, Tokens
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.paths import expand
from vitcomp_jax.results import environment
from vitcomp_jax.runs.run import Run, open_run
from vitcomp_jax.stages import search
from vitcomp_jax.weights.timm_names import to_timm

# What is measured, at which batch sizes, and the ways in which PyTorch does it there.
BATCH = 16
PARTS = {
  "dense": {BATCH: ("dense eager", "dense compiled"), 1: ("dense eager",)},
  "plan": {BATCH: ("plan eager",), 1: ("plan eager",)},
  "sliced": {BATCH: (), 1: ()},
  "search": {BATCH: ("search", "search without weight gradients")},
}
# Measured apart, on our side alone, and in few rounds: a forward pass takes seconds.
MAE_H, MAE_H_PLAN = "vit_huge_patch14_224.mae", "diffrate/mae_huge@103.4"
MAE_H_BATCH, MAE_H_ROUNDS = 2, 2
ALL = (*PARTS, "mae_h")

_ALIKE = 1e-2  # the largest relative distance of PyTorch's outputs from ours
_ADAM_B1 = 0.9


@dataclasses.dataclass(frozen=True)
class FirstTokens:
  """Keeps the first tokens, as many as another reducer: what it costs to choose and merge them is
  what this one does not do."""

  like: TokenReducer

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    n, keep = tokens.x.shape[1], self.count(tokens.x.shape[1])
    if keep == n:
      return tokens
    x = tokens.x[:, :keep]
    # Any sizes that XLA cannot foresee: attention takes them into account as under the plan.
    return Tokens.begin(x, tokens.num_prefix, size=1 + abs(x[..., 0]))

  def count(self, n: int) -> int:
    return self.like.count(n)


@dataclasses.dataclass
class Subject:
  """A subject to time besides the models that `timing.compiled` makes."""

  name: str
  batch: int
  time_once: Callable[[], float]
  seconds: list[float] = dataclasses.field(default_factory=list)


class Search:
  """Steps of the stage `search` on one batch.

  Attributes:
    arrays: Images, labels and the rates after a step, as `torch_vit.py` takes them.
  """

  def __init__(self, run: Run) -> None:
    task = search.task(run)
    batch = next(task.batches(0))
    batch.pop("index")
    self._step, self._batch = task.step_at(0), run.inputs.layout.put_batch(batch)
    self._state = run.inputs.layout.put_state(task.state)
    # The first rates stand where a count just is whole; which one it is, rounding decides.
    self.time_once()
    images = normalize(batch["image"], run.inputs.preprocess)
    self.arrays = {"search_images": _to_torch(images), "labels": batch["label"].astype(np.int64)}
    self.arrays |= _rates(self._state.arch)

  def time_once(self) -> float:
    begin = time.perf_counter()
    self._state, _ = self._step(self._state, self._batch, None)
    jax.block_until_ready(self._state)
    return time.perf_counter() - begin

  def gradient(self) -> np.ndarray:
    """The next step's gradient of all rates, which Adam's mean of gradients tells."""
    before = self._mean_gradient()
    self.time_once()
    return (self._mean_gradient() - _ADAM_B1 * before) / (1 - _ADAM_B1)

  def _mean_gradient(self) -> np.ndarray:
    mean = optax.tree.get(self._state.opt_state, "mu")["arch"]
    return np.concatenate(list(_rates(mean).values()))


class Peer:
  """A process that answers questions: a line of JSON each, and a line of JSON back."""

  def __init__(self, command: Sequence[str]) -> None:
    pipe = subprocess.PIPE
    self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

  def ask(self, *question: Any) -> dict[str, Any]:
    """The answer.

    Raises:
      RuntimeError: If there is none; what the process had to say stands on standard error.
    """
    assert self._process.stdin and self._process.stdout
    try:
      print(json.dumps(question), file=self._process.stdin, flush=True)
      return json.loads(self._process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError) as error:
      raise RuntimeError(f"no answer to {question!r}") from error

  def close(self) -> None:
    """Ends the input, with which the process ends."""
    with contextlib.suppress(BrokenPipeError):
      self._process.communicate()


def make_run(variant: str, plan: vc.Plan) -> Run:
  """Returns a search for a plan of the same cost from random weights; writes nothing."""
  config = vc.default_config()
  config.model.variant, config.data.name, config.data.workers = variant, "fake", 1
  config.budget.gmacs, config.search.batch_size = plan.gmacs, BATCH
  return open_run(from_config_dict(config), pathlib.Path("nowhere"))


def plan_counts(run: Run, plan: vc.Plan) -> list[tuple[int, int]]:
  """Both counts of every layer.

  Raises:
    vc.UserError: For a model or a plan that the PyTorch side does not know.
  """
  spec, layers = run.inputs.spec, plan.layers_for(run.inputs.spec)
  reducers = [layer.reduce for layer in layers]
  counts = [(r.prune_keep, r.merge_keep) for r in reducers if isinstance(r, PruneMerge)]
  pairs = zip(spec.dense_layers, counts, strict=False)
  known = tuple(dataclasses.replace(dense, reduce=PruneMerge(*pair)) for dense, pair in pairs)
  if known != layers or spec.pool != "cls" or spec.num_prefix > 1 or spec.layer_scale:
    raise vc.UserError(
      "--variant and --plan: expected a ViT that classifies CLS, its only prefix, and a plan of "
      f"DiffRate, got {spec.name} and a plan made by {plan.made_by}."
    )
  return counts


def check_torch(python: str) -> None:
  """Refuses an interpreter without PyTorch."""
  command = [python, "-c", "import torch, numpy"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
      return
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
  except OSError as error:
    reason = str(error.strerror)
  raise vc.UserError(
    f"--torch-python: expected an interpreter that can import torch and numpy, got {python} "
    f"({reason}); name another, or none to leave PyTorch out."
  )


@contextlib.contextmanager
def torch_side(
  python: str, run: Run, counts: Sequence[tuple[int, int]], arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[Peer, str]]:
  """PyTorch's process, which has our weights, plan and images, and PyTorch's version."""
  config, spec = run.config.search, run.inputs.spec
  options = {
    "target": run.inputs.target_gmacs * 1e9,
    "unit": search.searcher(run).method.budget_unit,
    "weight": config.budget_weight,
    "learning_rate": config.learning_rate,
    "betas": (_ADAM_B1, config.adam_b2),
  }
  setup = {"threads": threads(), "heads": spec.num_heads, "plan": counts, "search": options}
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "arrays.npz")
    np.savez(
      path, **arrays, **{f"weights.{k}": v for k, v in to_timm(run.artefacts.params).items()}
    )
    peer = Peer([python, str(pathlib.Path(__file__).with_name("torch_vit.py"))])
    with contextlib.closing(peer):
      yield peer, peer.ask({**setup, "arrays": path})["version"]


def compare(
  run: Run, plan: vc.Plan, parts: Sequence[str], python: str | None, seconds: float, rounds: int
) -> tuple[list[Any], dict[str, Any]]:
  """Times some of `PARTS` on both sides.

  Args:
    run: From `make_run`.
    plan: Of its model.
    parts: What is measured.
    python: An interpreter that has PyTorch; none: our side alone.
    seconds: Of timing that each subject is given.
    rounds: In which all take turns.

  Returns:
    The subjects; and PyTorch's version (`torch`), what it could not do, and why (`left_out`), and
    how far its first outputs are from ours, relative to them (`distances`).
  """
  counts = plan_counts(run, plan)
  spec, params = run.inputs.spec, run.artefacts.params
  dense, planned = spec.dense_layers, plan.layers_for(spec)
  sliced = tuple(dataclasses.replace(p, reduce=FirstTokens(p.reduce)) for p in planned)
  models = {"dense": dense, "plan": planned, "sliced": sliced}
  arrays = {"images": _to_torch(timing.noise(spec, BATCH))}
  if "search" in parts:
    steps = Search(run)
    arrays |= steps.arrays
  subjects: list[Any] = []
  found: dict[str, Any] = {"torch": None, "left_out": {}, "distances": {}}
  with contextlib.ExitStack() as stack:
    if python:
      peer, found["torch"] = stack.enter_context(torch_side(python, run, counts, arrays))
    for part, batch in ((name, batch) for name in parts for batch in PARTS[name]):
      if part == "search":
        subjects.append(Subject("jax search", batch, steps.time_once))
        expected = steps.gradient()
      else:
        mine = timing.compiled(f"jax {part}", ViT(spec, models[part]), params, batch)
        subjects.append(mine)
        expected = np.asarray(mine.forward(params, mine.images)).ravel()
      for way in PARTS[part][batch] if python else ():
        answer, row = peer.ask("prepare", way, batch), f"torch {way}"
        if "error" in answer:
          found["left_out"][row] = answer["error"]
          continue
        distance = np.linalg.norm(answer["outputs"] - expected) / np.linalg.norm(expected)
        if not distance < _ALIKE:
          raise RuntimeError(f"{row}, batch {batch}: {distance:.2g} away from our outputs")
        found["distances"][f"{row}, batch {batch}"] = float(f"{distance:.2g}")
        subjects.append(Subject(row, batch, _asks(peer, way, batch)))
    timing.take_turns(subjects, seconds, rounds)
  return subjects, found


def _asks(peer: Peer, way: str, batch: int) -> Callable[[], float]:
  return lambda: peer.ask("time", way, batch)["seconds"]


def time_mae_h(seconds: float) -> list[Any]:
  """ViT-H, dense and under its plan, with one set of weights."""
  dense, params = vc.load(MAE_H)
  plan = ViT(dense.spec, vc.load_plan(MAE_H_PLAN).layers_for(dense.spec))
  subjects = [
    timing.compiled(f"jax mae_h {name}", model, params, MAE_H_BATCH)
    for name, model in (("dense", dense), ("plan", plan))
  ]
  timing.take_turns(subjects, seconds, MAE_H_ROUNDS)
  return subjects


def ratios(subjects: Sequence[Any]) -> dict[str, float | None]:
  """Returns the ratios of medians; None where a part was left out."""
  median = {(s.name, s.batch): statistics.median(s.seconds) for s in subjects}
  eager, compiled = (median.get((f"torch {way}", BATCH)) for way in PARTS["dense"][BATCH])
  fastest = min((s for s in (eager, compiled) if s), default=None)

  def ours(name: str, batch: int = BATCH) -> float | None:
    return median.get((f"jax {name}", batch))

  def over(above: float | None, below: float | None) -> float | None:
    return round(above / below, 4) if above and below else None

  def saved(some: float | None, whole: float | None) -> float | None:
    return round(1 - some / whole, 4) if some and whole else None

  return {
    "dense_over_torch": over(fastest, ours("dense")),
    "plan_over_dense": over(ours("dense"), ours("plan")),
    "plan_over_dense_batch1": over(ours("dense", 1), ours("plan", 1)),
    "plan_over_torch_dense": over(fastest, ours("plan")),
    "reduction_share": saved(ours("sliced"), ours("plan")),
    "reduction_share_batch1": saved(ours("sliced", 1), ours("plan", 1)),
    "search_time_over_dense_time": over(ours("search"), ours("dense")),
    "search_over_torch": over(median.get(("torch search", BATCH)), ours("search")),
    "mae_h_plan_over_dense": over(
      ours("mae_h dense", MAE_H_BATCH), ours("mae_h plan", MAE_H_BATCH)
    ),
  }


def entry(subject: Any) -> dict[str, Any]:
  """One row of the table, and of the JSON file."""
  low, median, high = (float(s) for s in np.percentile(subject.seconds, (25, 50, 75)))
  return {
    "name": subject.name,
    "batch": subject.batch,
    "median_ms": round(1e3 * median, 3),
    "iqr_ms": round(1e3 * (high - low), 3),
    "images_per_second": round(subject.batch / median, 3),
    "timings": len(subject.seconds),
  }


def table(result: Mapping[str, Any]) -> str:
  """The rows, what was left out, and the ratios."""
  lines = [f"{'':40} {'batch':>5} {'median ms':>10} {'IQR ms':>8} {'images/s':>9}"]
  for e in result["entries"]:
    times = f"{e['median_ms']:10.1f} {e['iqr_ms']:8.1f} {e['images_per_second']:9.2f}"
    lines.append(f"{e['name']:40} {e['batch']:5} {times}")
  lines += [f"{name:40} left out: {why}" for name, why in result["left_out"].items()]
  for name, value in result["ratios"].items():
    lines.append(f"{name:40} {'-' if value is None else f'{value:.3f}'}")
  return "\n".join(lines)


def machine(torch: str | None) -> dict[str, Any]:
  """Describes the machine and the versions that were measured."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  versions = {"python": platform.python_version(), "torch": torch, **environment()["versions"]}
  return {"cpu": next(iter(names), platform.machine()), "cores": threads(), "versions": versions}


def threads() -> int:
  """The cores that XLA uses, and PyTorch is given."""
  return len(os.sched_getaffinity(0))


def _rates(arch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The rates that are learnt, or what belongs to them; some layers have nothing to choose."""
  found = {
    f"rates.{i}.{action}": np.asarray(arch[f"blocks_{i}"]["reduce"][f"{action}_logits"])
    for i in range(len(arch))
    for action in ("prune", "merge")
  }
  return {name: rate for name, rate in found.items() if rate.size > 1}


def _to_torch(images: np.ndarray) -> np.ndarray:
  """[b h w 3] -> [b 3 h w]."""
  return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--torch-python", default=sys.executable, help="has PyTorch; none: no PyTorch"
  )
  parser.add_argument("--json", type=pathlib.Path, help="where the figures are written")
  parser.add_argument("--only", default=",".join(ALL), help="parts, with commas between")
  parser.add_argument("--variant", default="deit_small_patch16_224", help="the model")
  parser.add_argument("--plan", default="diffrate/deit_small@2.9", help="its plan")
  parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each row")
  parser.add_argument("--rounds", type=int, default=5, help="in which all take turns")
  known = parser.parse_args(argv)
  parts = known.only.split(",")
  try:
    python = None if known.torch_python == "none" else expand(known.torch_python)
    file = known.json and pathlib.Path(expand(known.json))
    if unknown := set(parts) - set(ALL):
      raise vc.UserError(f"--only: expected some of {', '.join(ALL)}, got {min(unknown)!r}.")
    if known.rounds < 1:
      raise vc.UserError(f"--rounds: expected at least 1, got {known.rounds}.")
    if file and not file.absolute().parent.is_dir():
      raise vc.UserError(f"--json: expected a file in a folder that is there, got {file}.")
    if python:
      check_torch(python)
    plan = vc.load_plan(known.plan)
    run = make_run(known.variant, plan)
    pair = [part for part in PARTS if part in parts]
    subjects, found = compare(run, plan, pair, python, known.seconds, known.rounds)
  except vc.UserError as error:
    print(f"side_by_side: {error}", file=sys.stderr)
    return 2
  if "mae_h" in parts:
    subjects += time_mae_h(known.seconds)
  entries = [entry(subject) for subject in subjects]
  result = {"machine": machine(found.pop("torch")), "variant": known.variant, "plan": known.plan}
  result |= {"entries": entries, **found, "ratios": ratios(subjects)}
  print(table(result))
  if file:
    write_json(file, result)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
