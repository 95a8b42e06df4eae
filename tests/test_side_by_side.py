"""The comparison with PyTorch: our side of it, the protocol, and what it says without PyTorch."""

import dataclasses
import json
import pathlib
import runpy
import sys

import pytest

from tests.stages.test_slim import TINY, tiny_variant  # noqa: F401
from vitcomp_jax.models.reducers import PruneMerge
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import make_plan, save_plan

TOOL = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "benchmarks/side_by_side.py"))


@pytest.fixture
def command(tmp_path):
  """Quick options for a tiny model under a plan of its own."""
  spec = get_spec(TINY)
  layers = [dataclasses.replace(l, reduce=PruneMerge(20, 16)) for l in spec.dense_layers]
  save_plan(make_plan(spec, tuple(layers), {"method": "diffrate"}), tmp_path / "plan.json")
  options = ["--variant", TINY, "--plan", str(tmp_path / "plan.json"), "--seconds", "0.01"]
  return [*options, "--rounds", "1"]


def test_our_side(command, tmp_path, capsys):
  path = tmp_path / "found.json"
  options = ["--torch-python", "none", "--only", "dense,plan,search", "--json", str(path)]
  assert TOOL["main"]([*command, *options]) == 0
  found = json.loads(path.read_text())
  rows = {(e["name"], e["batch"]): e["median_ms"] for e in found["entries"]}
  parts = [("dense", 16), ("dense", 1), ("plan", 16), ("plan", 1), ("search", 16)]
  assert list(rows) == [(f"jax {part}", batch) for part, batch in parts]
  assert all(e["timings"] >= 3 for e in found["entries"]) and found["machine"]["cpu"]
  ratios = found["ratios"]
  dense = rows["jax dense", 16]
  assert ratios["plan_over_dense"] == pytest.approx(dense / rows["jax plan", 16], rel=0.01)
  share = rows["jax search", 16] / dense
  assert ratios["search_time_over_dense_time"] == pytest.approx(share, rel=0.01)
  assert ratios["dense_over_torch"] is ratios["mae_h_plan_over_dense"] is None
  printed = capsys.readouterr().out
  assert "jax search" in printed and "search_over_torch" in printed


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
