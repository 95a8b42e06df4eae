"""The comparison with PyTorch: our side of it, the protocol, and what it says without PyTorch."""

import dataclasses
import json
import pathlib
import runpy
import sys

import pytest

from tests.stages.test_slim import TINY, tiny_variant  # noqa: F401
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.variants import VARIANTS, get_spec
from vitcomp_jax.plans import make_plan, save_plan

TOOL = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "benchmarks/side_by_side.py"))


@pytest.fixture
def command(tmp_path, monkeypatch):
  """Quick options for a tiny model of three layers, under a plan of its own."""
  monkeypatch.setitem(VARIANTS, TINY, dataclasses.replace(VARIANTS[TINY], depth=3))
  spec = get_spec(TINY)
  reducers = PruneMerge(spec.num_tokens, spec.num_tokens), PruneMerge(20, 16), PruneMerge(9, 2)
  pairs = zip(spec.dense_layers, reducers, strict=True)
  layers = tuple(dataclasses.replace(layer, reduce=reducer) for layer, reducer in pairs)
  save_plan(make_plan(spec, layers, {"method": "diffrate"}), tmp_path / "plan.json")
  options = ["--variant", TINY, "--plan", str(tmp_path / "plan.json"), "--seconds", "0.01"]
  return [*options, "--rounds", "1"]


def test_our_side(command, tmp_path, capsys):
  path = tmp_path / "found.json"
  options = ["--torch-python", "none", "--only", "plan,sliced,search", "--json", str(path)]
  assert TOOL["main"]([*command, *options]) == 0
  found = json.loads(path.read_text())
  rows = [(entry["name"], entry["batch"]) for entry in found["entries"]]
  ours = [("jax plan", 16), ("jax plan", 1), ("jax sliced", 16), ("jax sliced", 1)]
  assert rows == [*ours, ("jax search", 16)]
  assert all(e["timings"] >= 3 and e["median_ms"] > 0 for e in found["entries"])
  assert found["machine"]["cpu"]
  measured = {name for name, ratio in found["ratios"].items() if ratio is not None}
  assert measured == {"reduction_share", "reduction_share_batch1"}
  printed = capsys.readouterr().out
  assert "jax search" in printed and "search_over_torch" in printed


def test_ratios_are_of_medians():
  seconds = {
    ("jax dense", 16): 2.0,
    ("torch dense eager", 16): 4.0,
    ("torch dense compiled", 16): 3.0,
    ("jax dense", 1): 0.6,
    ("torch dense eager", 1): 0.1,
    ("jax plan", 16): 1.0,
    ("jax plan", 1): 0.2,
    ("jax sliced", 16): 0.75,
    ("jax sliced", 1): 0.15,
    ("jax search", 16): 5.0,
    ("torch search", 16): 10.0,
    ("torch search without weight gradients", 16): 8.0,
    ("jax mae_h dense", 2): 9.0,
    ("jax mae_h plan", 2): 6.0,
  }
  subjects = [TOOL["Subject"](*key, None, [s, s, 100.0]) for key, s in seconds.items()]
  assert TOOL["ratios"](subjects) == {
    "dense_over_torch": 1.5,
    "plan_over_dense": 2.0,
    "plan_over_dense_batch1": 3.0,
    "plan_over_torch_dense": 3.0,
    "reduction_share": 0.25,
    "reduction_share_batch1": 0.25,
    "search_time_over_dense_time": 2.5,
    "search_over_torch": 2.0,
    "mae_h_plan_over_dense": 1.5,
  }


def test_an_interpreter_without_pytorch_is_refused(command, tmp_path, capsys):
  python = tmp_path / "python"
  python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages
  python.chmod(0o755)
  for path, reason in ((python, "No module named 'torch'"), (tmp_path / "none", "No such file")):
    assert TOOL["main"]([*command, "--torch-python", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"got {path} (" in said and reason in said and said.count("\n") == 1


def test_other_mistakes(command, tmp_path, capsys):
  none = ["--torch-python", "none"]
  for options, said in (
    (["--only", "dense,plam"], "got 'plam'"),
    (["--rounds", "0"], "at least 1, got 0"),
    (["--json", str(tmp_path / "no" / "f.json")], "a folder that is there"),
    (["--variant", "deit_small_patch16_224"], "expected 12 layers"),
  ):
    assert TOOL["main"]([*command, *none, *options]) == 2
    assert said in capsys.readouterr().err


def test_a_peer_answers_a_line_for_a_line():
  echo = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
  peer = TOOL["Peer"]([sys.executable, "-S", "-c", echo])
  assert peer.ask("time", "dense", 16) == ["time", "dense", 16]
  assert peer.ask({"threads": 2}) == [{"threads": 2}]
  peer.close()
  silent = TOOL["Peer"]([sys.executable, "-S", "-c", "input()"])
  with pytest.raises(RuntimeError, match="no answer to"):
    silent.ask("time", "dense", 16)
  silent.close()
  slow = TOOL["Peer"]([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
  with pytest.raises(TimeoutError, match="no answer within 0 s"):
    slow.ask("time", timeout=0.05)
  slow.close()  # at once, as it was ended
