"""The benchmark of predicted latencies, on a tiny model."""

import json
import pathlib
import runpy

import pytest

from tests.stages.test_slim import TINY, tiny_variant  # noqa: F401
from vitcomp_jax.cost import latency

main = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "benchmarks/latency_model.py"))[
  "main"
]


@pytest.mark.slow
def test_plans_are_predicted_and_measured(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(latency, "_COUNTS", 2)  # instead of 11, each of which is compiled thrice
  path = tmp_path / "found.json"
  options = ["--batch", "2", "--plans", "1", "--rounds", "1", "--json", str(path)]
  main(["--variant", TINY, *options])
  found = json.loads(path.read_text())
  assert [row["plan"] for row in found["plans"]] == ["dense", "plan 1"]
  for row in found["plans"]:
    assert row["predicted_ms"] > 0 and row["measured_ms"] > 0
    assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
  assert found["worst_error"] >= found["median_error"]
  assert "error: median" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("options", "said"),
  [
    (["--rounds", "0"], "--rounds: expected at least 1"),
    (["--variant", "vit_tinny"], "vit_tinny"),
    (["--variant", "caformer_s36"], "caformer_s36"),
  ],
)
def test_mistakes(options, said, capsys):
  with pytest.raises(SystemExit) as ended:
    main(options)
  assert ended.value.code == 2 and said in capsys.readouterr().err
