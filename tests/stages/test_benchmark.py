"""The benchmark: what it reports, and where it goes."""

import json

import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import timing
from vitcomp_jax.stages import benchmark, run_stages


def _config():
  config = tiny_config()
  config.budget.fraction = 0.8
  config.benchmark.batch_sizes, config.benchmark.seconds, config.benchmark.rounds = (1, 2), 0.1, 2
  return config


@pytest.mark.slow
def test_a_benchmark_beside_an_evaluation(tmp_path):
  config = _config()
  config.stages = ("search", "evaluate", "benchmark")
  run = run_stages(from_config_dict(config), tmp_path, config.stages)
  found = benchmark.made(run)
  names = [(entry["name"], entry["batch"]) for entry in found["entries"]]
  assert names == [("dense", 1), ("diffrate", 1), ("dense", 2), ("diffrate", 2)]
  for entry in found["entries"]:
    assert entry["images_per_second"] > 0 and entry["timings"] >= 6
    assert 0 < entry["share_of_peak"] < 1 and entry["compile_s"] > 0 and entry["memory_mb"] > 0
    latency = entry["latency_ms"]
    assert latency["p50"] <= latency["p90"] <= latency["p99"]
    # The median of the latencies is what the rate is made of.
    assert entry["images_per_second"] == pytest.approx(1e3 * entry["batch"] / latency["p50"], 0.01)
    if entry["name"] == "diffrate":
      assert entry["promised"] == pytest.approx(1 / 0.8, rel=0.05)
      share = entry["speed_up"] / entry["promised"]
      assert entry["share_of_promise"] == pytest.approx(share, abs=1e-3)
  rows = {row["name"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
  assert set(rows["diffrate"]["images_per_second"]) == {"1", "2"} and "top1" in rows["diffrate"]
  report = (tmp_path / "report.md").read_text()
  assert "## Speed" in report and "images/s, batch 2" in report


@pytest.mark.slow
def test_an_evaluation_fills_the_rows_that_a_benchmark_made(tmp_path):
  config = _config()
  config.stages, config.benchmark.batch_sizes = ("benchmark", "evaluate"), (1,)
  vc.run_stage("benchmark", config, tmp_path)
  rows = json.loads((tmp_path / "result.json").read_text())["rows"]
  assert [row["name"] for row in rows] == ["dense"] and "top1" not in rows[0]
  row = vc.run_stage("evaluate", config, tmp_path)["rows"][0]
  assert "top1" in row and row["images_per_second"] == rows[0]["images_per_second"]


def test_all_take_turns():
  order = []

  class Subject:
    def __init__(self, name):
      self.name, self.seconds = name, []

    def time_once(self):
      order.append(self.name)
      return 1.0

  subjects = [Subject("a"), Subject("b")]
  timing.take_turns(subjects, 0.0, 2)
  assert "".join(order) == "ab" + 2 * ("aaa" + "bbb")
  assert [len(subject.seconds) for subject in subjects] == [6, 6]


def test_nothing_to_time_is_refused(tmp_path):
  config = _config()
  config.evaluate.dense = False
  with pytest.raises(vc.UserError, match="expected a dense model or a plan to time"):
    vc.run_stage("benchmark", config, tmp_path)
