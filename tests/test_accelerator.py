"""The measurement on accelerators: what it compares, how it ends, and all of it in small."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time

import accelerator
import accelerator_cases as cases
import jax
import pytest
from accelerator_report import CHOOSING, markdown, ratios
from common import Subject, plan_counts

import vitcomp_jax as vc
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.build import build
from vitcomp_jax.ops.attention import attend

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PART = cases.Part("speed", cases._SMALL, 2, "bfloat16")


@pytest.fixture
def measuring(tmp_path):
  begin = time.monotonic()
  return accelerator.Measuring(tmp_path, 8.0, "tiny", accelerator.TorchSide(None), begin)


@pytest.fixture(scope="module")
def subjects():
  with jax.numpy_dtype_promotion("standard"):
    return cases.Subjects(cases._SMALL, is_tiny=True)


def test_parts_cover_everything_once():
  batches = accelerator.BATCHES["full"]
  first, rest = cases.parts(batches), cases.more_parts(batches)
  assert len({*first, *rest}) == len(first) + len(rest)
  for field, values in (
    ("kind", cases.KINDS),
    ("model", cases.PLANS),
    ("batch", batches),
    ("dtype", ("bfloat16", "float32")),
  ):
    assert {getattr(part, field) for part in first} == set(values)
  speed = [part for part in first + rest if part.kind == "speed"]
  assert len(speed) == len(cases.PLANS) * len(batches) * 2
  for name, plan in cases.PLANS.items():
    assert plan is None or vc.load_plan(plan).layers_for(vc.get_spec(name))


def test_forms():
  assert cases.forms("bfloat16", "gpu") == ("cudnn", "xla")
  for dtype, platform in (("float32", "gpu"), ("bfloat16", "tpu"), ("bfloat16", "cpu")):
    assert cases.forms(dtype, platform) == ("xla",)


def test_rows_of_a_model(subjects):
  counts = {}
  for what in ("dense", "plan", "first tokens", "tile 8", "tome", "evit"):
    layers, n = subjects.layers(what), subjects.spec.num_tokens
    counts[what] = [n := layer.reduce.count(n) for layer in layers]
  assert counts["first tokens"] == counts["plan"] != counts["dense"]
  most = subjects.spec.num_tokens
  assert counts["tile 8"] == [min(-(-count // 8) * 8, most) for count in counts["plan"]]
  of_dense = subjects.gmacs(subjects.layers("dense"))
  for what in ("plan", "tome", "evit"):  # a token more or less is much for so few
    share = subjects.gmacs(subjects.layers(what)) / of_dense
    assert share == pytest.approx(cases.SHARE, abs=0.05)
  assert subjects.in_timm()["plan"] == [
    (layer.reduce.prune_keep, layer.reduce.merge_keep) for layer in subjects.layers("plan")
  ]


def test_a_search_is_prepared(subjects):
  with jax.numpy_dtype_promotion("standard"):
    steps = subjects.search(2, "float32", "xla")
  learnt = {f"blocks_{i}" for i in range(1, subjects.spec.depth - 1)}  # the head reads CLS
  assert {name for name, rates in steps.state.arch.items() if rates} == learnt


def test_what_pytorch_has_no_plan_for():
  reducer = PruneMerge(100, 90)
  for name, is_known in ((cases._BASE, True), (cases._HUGE, False), (cases._DINO, False)):
    spec = vc.get_spec(name)
    layers = tuple(dataclasses.replace(layer, reduce=reducer) for layer in spec.dense_layers)
    assert plan_counts(spec, layers) == ([(100, 90)] * spec.depth if is_known else None)
  base = vc.get_spec(cases._BASE)
  assert plan_counts(base, vc.evit(build(base, base.dense_layers), 0.7).layers_for(base)) is None


def test_what_fails_is_left_out_and_named(measuring, subjects, monkeypatch):
  def too_large(left):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes")

  def too_slow(left):
    assert 0 < left <= 0.25 * 8 * 60
    raise TimeoutError

  def too_late():
    raise RuntimeError("the process that had it was ended")

  rows = {
    "torch dense eager": lambda left: Subject("torch dense eager", 2, too_late),
    "dense xla": lambda left: Subject("dense xla", 2, lambda: 0.5),
    "plan xla": too_large,
    "first tokens xla": too_slow,
  }
  measuring._subjects = PART.model, subjects
  monkeypatch.setattr(measuring, "_begun", lambda part, subjects: rows)
  measuring._measure(PART)
  (row,) = measuring.result["rows"]
  assert (row["name"], row["median_ms"], row["images_per_second"]) == ("dense xla", 500.0, 4.0)
  assert row["part"] == str(PART) and row["gmacs"] > 0
  memory = "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
  assert [(each["name"], each["why"]) for each in measuring.result["skipped"]] == [
    ("plan xla", memory),
    ("first tokens xla", "not ready at the part's deadline"),
    ("torch dense eager", "RuntimeError: the process that had it was ended"),
  ]


def test_the_time_ends_it(measuring, tmp_path, monkeypatch):
  monkeypatch.setattr(accelerator, "checks", lambda *_: [cases.Check("dense", 0.2, lambda: 0.1)])
  measuring._end = 0.0
  assert measuring.run()
  found = json.loads((tmp_path / "accelerator.json").read_text())
  assert found["checks"] == [{"name": "dense", "distance": 0.1, "limit": 0.2, "agrees": True}]
  late = [each["part"] for each in found["skipped"] if each["why"] == "no time left"]
  assert late == [str(part) for part in cases.parts(accelerator.BATCHES["tiny"])]
  assert "| dense | 0.1 | 0.2 | True |" in (tmp_path / "accelerator.md").read_text()


def test_outputs_that_disagree_end_with_an_error(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(accelerator, "checks", lambda *_: [cases.Check("plan", 0.2, lambda: 0.3)])
  options = ["--out", str(tmp_path), "--minutes", "0.001", "--scale", "tiny", "--torch", "none"]
  assert accelerator.main(options) == 1
  said = capsys.readouterr()
  assert "do not agree" in said.err and "| plan | 0.3 | 0.2 | False |" in said.out


def test_attention_that_ignores_sizes_is_found_out(monkeypatch):
  with jax.numpy_dtype_promotion("standard"):
    check = cases.checks("cpu", True, None)[0]
    assert check.name == "attention xla" and check.result()["agrees"]

    def without_sizes(q, k, v, scale, log_size, form):
      kept = log_size if q.dtype == "float32" else None
      return attend(q, k, v, scale, kept, form=form)

    monkeypatch.setattr(cases, "attend", without_sizes)
    assert not check.result()["agrees"]


def test_a_form_that_is_not_there_is_not_said_to_agree(measuring, monkeypatch):
  def missing():
    raise RuntimeError("cuDNN is not detected.")

  found = [cases.Check("plan cudnn", 0.2, missing), cases.Check("plan xla", 0.2, lambda: 0.1)]
  monkeypatch.setattr(accelerator, "checks", lambda *_: found)
  measuring._end = 0.0
  assert not measuring.run()
  assert [check["name"] for check in measuring.result["checks"]] == ["plan xla"]
  why = "RuntimeError: cuDNN is not detected."
  assert {"part": "checks", "name": "plan cudnn", "why": why} in measuring.result["skipped"]


def test_ratios():
  ms = {
    "dense cudnn": 2.0,
    "dense xla": 4.0,
    "plan cudnn": 1.25,
    "plan xla": 1.0,
    "first tokens cudnn": 1.0,
    "torch dense compiled": 3.0,
  }
  rows = [{"part": "a", "name": name, "median_ms": value} for name, value in ms.items()]
  rows += [{"part": "b", "name": "dense xla", "median_ms": 2.0}]
  rows += [{"part": "b", "name": "search xla", "median_ms": 5.0}]
  found = ratios(rows)
  assert found == [
    {
      "part": "a",
      "dense over compiled PyTorch": 1.5,
      "plan over dense": 2.0,
      "plan over compiled PyTorch, dense": 3.0,
      "cudnn over xla, dense": 2.0,
      "cudnn over xla, plan": 0.8,
      CHOOSING: 0.2,
    },
    {"part": "b", "search step in dense passes": 2.5},
  ]
  about = {"device": "1 x cpu", "versions": {"jax": "0.10.2"}}
  lists = {"rows": rows, "ratios": found, "checks": [], "skipped": []}
  text = markdown({"about": about, **lists})
  assert text.startswith("1 x cpu; jax 0.10.2.") and "| plan over dense | 2.0 |" in text


def test_mistakes(tmp_path, capsys):
  (tmp_path / "file").touch()
  for options, said in (
    (["--out", str(tmp_path / "file" / "results"), "--torch", "none"], "Not a directory"),
    (["--minutes", "0"], "a number above 0, got 0.0"),
    (["--torch", str(tmp_path / "python")], "import torch and timm, got"),
  ):
    assert accelerator.main(options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path):
  """With PyTorch too, where it and timm are installed."""
  options = ["--scale", "tiny", "--minutes", "20", "--out", str(tmp_path)]
  command = [sys.executable, os.path.join(ROOT, "benchmarks", "accelerator.py"), *options]
  environment = os.environ | {"PYTHONPATH": ROOT}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads((tmp_path / "accelerator.json").read_text())
  has_torch = all(importlib.util.find_spec(name) for name in ("torch", "timm"))
  skipped = {(each["part"], each["name"]) for each in found["skipped"]}
  assert skipped == {("all", "cudnn")} | (set() if has_torch else {("all", "torch")})
  expected = set()
  for part in cases.parts(accelerator.BATCHES["tiny"]):
    expected |= {(str(part), f"{what} xla") for what in ("dense", *cases.KINDS[part.kind])}
    if part.kind == "speed" and has_torch:
      ways = cases.TORCH if "deit" in part.model else cases.TORCH[:-1]
      expected |= {(str(part), f"torch {way}") for way in ways}
  assert {(row["part"], row["name"]) for row in found["rows"]} == expected
  assert len(found["checks"]) == (5 if has_torch else 3)
  assert all(check["agrees"] for check in found["checks"])
  assert all(len(each) > 1 for each in found["ratios"])
  assert (tmp_path / "accelerator.md").read_text() in done.stdout
