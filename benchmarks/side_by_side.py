"""Compares the speed of vitcomp_jax and PyTorch on a CPU: forward passes, plans and search steps.

  python benchmarks/side_by_side.py [--torch-python PATH] [--json FILE] [--only dense,plan]

PyTorch runs in its own process (`torch_vit.py`), with the same number of threads and the same
random weights and images. First, its outputs are compared with ours. All rows are timed in turn, so
that other load on the machine affects all of them equally, and medians are compared. The benchmark
needs Linux; see docs/performance.md.
"""

import argparse
import contextlib
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from common import (
  Peer,
  SearchSteps,
  Subject,
  check_torch,
  entry,
  plan_counts,
  threads,
  to_torch,
  without_choice,
)

import vitcomp_jax as vc
from vitcomp_jax.atomic import write_json
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import timing
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.paths import expand
from vitcomp_jax.results import environment
from vitcomp_jax.runs.run import Run, open_run
from vitcomp_jax.stages import search
from vitcomp_jax.weights.timm_names import to_timm

# Measured parts by name, with PyTorch's counterparts at each batch size.
BATCH = 16
PARTS = {
  "dense": {BATCH: ("dense eager", "dense compiled"), 1: ("dense eager",)},
  "plan": {BATCH: ("plan eager",), 1: ("plan eager",)},
  "sliced": {BATCH: (), 1: ()},
  "search": {BATCH: ("search", "search without weight gradients")},
}
# Measured separately, without PyTorch and in few rounds, because a forward pass takes seconds.
MAE_H, MAE_H_PLAN = "vit_huge_patch14_224.mae", "diffrate/mae_huge@103.4"
MAE_H_BATCH, MAE_H_ROUNDS = 2, 2
ALL = (*PARTS, "mae_h")

_ALIKE = 1e-2  # largest relative distance between PyTorch's outputs and ours
_ADAM_B1 = 0.9


class Search(SearchSteps):
  """Runs steps of the stage `search` on one batch.

  Attributes:
    arrays: Images, labels and the rates after one step, as inputs for `torch_vit.py`.
  """

  def __init__(self, run: Run) -> None:
    task = search.task(run)
    batch = next(task.batches(0))
    batch.pop("index")
    super().__init__(task, run.inputs.layout, batch)
    # The initial rates give exact integer counts, which rounding errors could change.
    self.time_once()
    images = normalize(batch["image"], run.inputs.preprocess)
    self.arrays = {"search_images": to_torch(images), "labels": batch["label"].astype(np.int64)}
    self.arrays |= _rates(self.state.arch)

  def gradient(self) -> np.ndarray:
    """Runs a step and returns the gradient of all rates, computed from Adam's first moment."""
    before = self._mean_gradient()
    self.time_once()
    return (self._mean_gradient() - _ADAM_B1 * before) / (1 - _ADAM_B1)

  def _mean_gradient(self) -> np.ndarray:
    mean = optax.tree.get(self.state.opt_state, "mu")["arch"]
    return np.stack(list(_rates(mean).values()))


def make_run(variant: str, plan: vc.Plan) -> Run:
  """Opens a search with random weights, at the cost of the plan; writes nothing."""
  config = vc.default_config()
  config.model.variant, config.data.name, config.data.workers = variant, "fake", 1
  config.budget.gmacs, config.search.batch_size = plan.gmacs, BATCH
  return open_run(from_config_dict(config), pathlib.Path("nowhere"))


def checked_counts(run: Run, plan: vc.Plan) -> list[tuple[int, int]]:
  """Returns the pruned and the merged count of every layer.

  Raises:
    vc.UserError: If the PyTorch side does not support the model or the plan.
  """
  spec = run.inputs.spec
  counts = plan_counts(spec, plan.layers_for(spec))
  if counts is None:
    raise vc.UserError(
      "--variant and --plan: expected a ViT that classifies CLS, its only prefix, and a plan of "
      f"DiffRate, got {spec.name} and a plan made by {plan.made_by}."
    )
  return counts


@contextlib.contextmanager
def torch_side(
  python: str, run: Run, counts: Sequence[tuple[int, int]], arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[Peer, str]]:
  """Yields PyTorch's process, set up with our weights, plan and images, and PyTorch's version."""
  config, spec = run.config.search, run.inputs.spec
  options = {
    "target": run.inputs.target_gmacs * 1e9,
    "unit": search.trainer(run).method.budget_unit,
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
    run: The run from `make_run`.
    plan: A plan for its model.
    parts: Names of the parts.
    python: Python interpreter with PyTorch; None to leave PyTorch out.
    seconds: Total time for each subject.
    rounds: Number of rounds.

  Returns:
    The subjects; and a dict with PyTorch's version (`torch`), the subjects that failed in PyTorch
    with reasons (`left_out`), and the relative distances of its outputs from ours (`distances`).
  """
  counts = checked_counts(run, plan)
  spec, params = run.inputs.spec, run.artefacts.params
  dense, planned = spec.dense_layers, plan.layers_for(spec)
  models = {"dense": dense, "plan": planned, "sliced": without_choice(planned)}
  arrays = {"images": to_torch(timing.noise(spec, BATCH))}
  if "search" in parts:
    steps = Search(run)
    arrays |= steps.arrays
  subjects: list[Any] = []
  found: dict[str, Any] = {"torch": None, "left_out": {}, "distances": {}}
  with contextlib.ExitStack() as stack:
    if python:
      peer, found["torch"] = stack.enter_context(torch_side(python, run, counts, arrays))
    timed = []
    for name in parts:
      timed += [(name, batch) for batch in PARTS[name]]
    for part, batch in timed:
      if part == "search":
        subjects.append(Subject("jax search", batch, steps.time_once))
        expected = steps.gradient()
      else:
        mine = timing.compiled(f"jax {part}", ViT(spec, models[part]), params, batch)
        subjects.append(mine)
        expected = np.asarray(mine.run()).ravel()
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
  """Times ViT-H, dense and under its plan, with one set of weights."""
  dense, params = vc.load(MAE_H)
  plan = ViT(dense.spec, vc.load_plan(MAE_H_PLAN).layers_for(dense.spec))
  subjects = [
    timing.compiled(f"jax mae_h {name}", model, params, MAE_H_BATCH)
    for name, model in (("dense", dense), ("plan", plan))
  ]
  timing.take_turns(subjects, seconds, MAE_H_ROUNDS)
  return subjects


def ratios(subjects: Sequence[Any]) -> dict[str, float | None]:
  """Returns the ratios of medians, None for those whose parts were not measured."""
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


def table(result: Mapping[str, Any]) -> str:
  """Formats the rows, the skipped rows and the ratios."""
  lines = [f"{'':40} {'batch':>5} {'median ms':>10} {'IQR ms':>8} {'images/s':>9}"]
  for e in result["entries"]:
    times = f"{e['median_ms']:10.1f} {e['iqr_ms']:8.1f} {e['images_per_second']:9.2f}"
    lines.append(f"{e['name']:40} {e['batch']:5} {times}")
  lines += [f"{name:40} left out: {why}" for name, why in result["left_out"].items()]
  for name, value in result["ratios"].items():
    lines.append(f"{name:40} {'-' if value is None else f'{value:.3f}'}")
  return "\n".join(lines)


def machine(torch: str | None) -> dict[str, Any]:
  """Describes the machine and the installed versions."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  versions = {"python": platform.python_version(), "torch": torch, **environment()["versions"]}
  return {"cpu": next(iter(names), platform.machine()), "cores": threads(), "versions": versions}


def _rates(arch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the rates (or their gradients) by name, for the layers that have any."""
  found = {}
  for i in range(len(arch)):
    for action, rate in sorted(arch[f"blocks_{i}"].get("reduce", {}).items(), reverse=True):
      found[f"rates.{i}.{action}"] = np.asarray(rate)
  return found


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--torch-python", default=sys.executable, help="has PyTorch; none: no PyTorch"
  )
  parser.add_argument("--json", type=pathlib.Path, help="file to write the results to")
  parser.add_argument("--only", default=",".join(ALL), help="parts, separated by commas")
  parser.add_argument("--variant", default="deit_small_patch16_224", help="the model")
  parser.add_argument("--plan", default="diffrate/deit_small@2.9", help="its plan")
  parser.add_argument("--seconds", type=float, default=10.0, help="seconds of timing for each row")
  parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
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
      check_torch(python, "--torch-python")
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
