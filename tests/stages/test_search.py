"""Searches by latency, and for several budgets, as runs on a tiny model."""

import dataclasses
import itertools
import json

import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import latency
from vitcomp_jax.cost.cost_models import Latency
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.runs.inputs import Inputs
from vitcomp_jax.runs.run import make_run, open_run
from vitcomp_jax.stages import run_stages, search
from vitcomp_jax.training.search import SearchTrainer

_TABLE = Latency((2, 14, 26), (1.0, 2.0, 4.0), (0.1, 0.1, 0.2), (1.0, 3.0, 5.0), 0.5)


@pytest.fixture
def given_table(monkeypatch):
  """What a layer takes on a busy machine may be anything; what it would take here may not."""
  monkeypatch.setattr(latency, "programs", lambda *_: {})
  monkeypatch.setattr(latency, "tabulate", lambda *_: _TABLE)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what jax2onnx imports
@pytest.mark.parametrize(("runtime", "other"), [("jax", "onnxruntime"), ("onnxruntime", "jax")])
def test_a_search_by_latency(runtime, other, tmp_path, monkeypatch, given_table):
  config = tiny_config()
  config.compilation_cache = str(tmp_path / "cache/xla")
  config.budget.fraction, config.budget.latency_ms, config.budget.latency_batch = None, 1.0, 2
  config.budget.runtime = runtime
  config.benchmark.batch_sizes, config.benchmark.seconds, config.benchmark.rounds = (), 0.01, 1
  config.stages = ("search", "benchmark")
  spec = open_run(from_config_dict(config), tmp_path / "none").inputs.spec
  cost = latency.table(spec, 2, PruneMerge, tmp_path / "cache/latency", runtime)
  dense = cost.static(spec, spec.dense_layers)
  assert dense == 0.5 + 3 * 9.0
  config.budget.latency_ms = 20.0
  # From here on the table is in the cache, and nothing is measured again.
  monkeypatch.setattr(latency, "programs", None)
  run = run_stages(from_config_dict(config), tmp_path / "run", config.stages)
  assert latency.read(tmp_path / "run/latency.json", runtime) == cost == run.inputs.cost
  made_by = run.artefacts.plan.made_by
  assert made_by["device"] == latency.device_name() and made_by["batch"] == 2
  assert made_by["runtime"] == runtime
  assert made_by["latency_ms"] == pytest.approx(cost.static(spec, run.artefacts.layers), abs=1e-3)
  assert made_by["latency_ms"] == pytest.approx(20, rel=0.03)
  records = read_metrics(tmp_path / "run", "search")
  assert all(record["latency_ms"] > 0 and record["gmacs"] > 0 for record in records)
  entries = json.loads((tmp_path / "run/benchmark.json").read_text())["entries"]
  assert {entry["runtime"] for entry in entries} == {runtime}
  foretold = {(entry["name"], entry["batch"]): entry["predicted_ms"] for entry in entries}
  assert foretold["dense", 2] == pytest.approx(dense, abs=1e-3)
  assert foretold["diffrate", 2] == pytest.approx(made_by["latency_ms"], abs=1e-3)
  report = (tmp_path / "run/report.md").read_text()
  assert "predicted (ms)" in report and f"on {made_by['device']}" in report
  assert ("of ONNX Runtime" in report) == ("dense, onnxruntime" in report) == (runtime != "jax")

  # Without a cache a workdir's own table stands, so that a run goes on as it began.
  config.compilation_cache = None
  assert make_run(from_config_dict(config), tmp_path / "run").inputs.cost == cost
  config.budget.latency_ms = 2 * dense
  with pytest.raises(vc.UserError, match="at most .* ms, what the dense model takes, got"):
    _ = make_run(from_config_dict(config), tmp_path / "run").inputs.targets
  config.budget.runtime = other
  with pytest.raises(vc.UserError, match=f"expected a table of {other}, got one of {runtime}"):
    _ = make_run(from_config_dict(config), tmp_path / "run").inputs.cost


_SHARES = (0.9, 0.7)


def _front():
  config = tiny_config()
  config.budget.fraction, config.budget.fractions = None, _SHARES
  config.search.steps, config.search.checkpoint_every, config.search.log_every = 4, 1, 1
  config.evaluate.token_maps, config.evaluate.baselines = 0, ("uniform_merge",)
  return config


def _losses(workdir):
  return [
    [(record["step"], record["loss"]) for record in read_metrics(workdir, f"search@{share}")]
    for share in _SHARES
  ]


@pytest.mark.slow
def test_a_front(tmp_path):
  plan = vc.run_stage("search", _front(), tmp_path)
  dense = vc.count_cost(vc.load(plan.variant, num_classes=10)[0]).gmacs
  for share in _SHARES:
    found = vc.load_plan(str(tmp_path / f"plans/diffrate@{share}.json"))
    assert found.gmacs == pytest.approx(share * dense, rel=0.02)
  assert found == plan
  # Together half as many again as one search has.
  assert [len(losses) for losses in _losses(tmp_path)] == [3, 3]
  rows = {row["name"]: row for row in vc.run_stage("evaluate", _front(), tmp_path)["rows"]}
  names = [f"{method}@{share}" for method in ("diffrate", "uniform_merge") for share in _SHARES]
  assert list(rows) == ["dense", *names]
  assert rows["diffrate@0.7"]["gmacs"] == pytest.approx(plan.gmacs, abs=1e-6)
  report = (tmp_path / "report.md").read_text()
  assert "One search for all budgets: 6 steps" in report and "| diffrate@0.9 |" in report
  assert (tmp_path / "figures/search.png").exists()


@pytest.mark.slow
def test_a_front_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
  alone, cut = tmp_path / "alone", tmp_path / "cut"
  plan = vc.run_stage("search", _front(), alone)
  given, batches = itertools.count(), Inputs.train_batches

  def cut_off(self, batch_size, start_step):
    for batch in batches(self, batch_size, start_step):
      if next(given) == 7:  # after a batch to start by, three steps, one to choose by, two steps
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(Inputs, "train_batches", cut_off)
    with pytest.raises(KeyboardInterrupt):
      vc.run_stage("search", _front(), cut)
  assert len(_losses(cut)[1]) == 2 and not (cut / "plans/diffrate@0.7.json").exists()
  assert vc.run_stage("search", _front(), cut) == plan
  for name in ("plan.json", "plans/diffrate@0.9.json", "plans/diffrate@0.7.json"):
    assert (cut / name).read_text() == (alone / name).read_text()
  assert _losses(cut) == _losses(alone)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"fractions": (0.7, 0.9)}, "config.budget.fractions: expected falling shares"),
    ({"fractions": ()}, "config.budget.fractions: expected falling shares"),
    ({"fractions": (1.2, 0.9)}, "fractions: expected more than 0 and at most 1 of .* got 1.2"),
    ({"fractions": (0.9, 0.01)}, "smallest plan"),
    ({"fractions": (0.9,), "latency_ms": 3.0}, r"got fractions \(0.9,\) and latency_ms 3.0"),
    ({}, "expected one of fraction, fractions, gmacs, latency_ms, got none"),
    ({"fractions": (0.9, 0.8, 0.7)}, "config.search.steps: expected at least one for each of 3"),
    (
      {"latency_ms": 1e-3, "recipe": "paper"},
      "config.search.recipe: expected ours for a budget in ms",
    ),
    ({"latency_ms": 3.0, "stages": ("slim", "search")}, "expected a search on the dense model"),
  ],
)
def test_a_budget_that_cannot_be_met_is_refused(changes, said, tmp_path, given_table):
  config = tiny_config(w_patch=0.0)
  changes = dict(changes)
  config.budget.fraction, config.search.steps = None, 1
  config.search.recipe = changes.pop("recipe", "ours")
  config.stages = changes.pop("stages", ("search",))
  for key, value in changes.items():
    config.budget[key] = value
  with pytest.raises(vc.UserError, match=said):
    vc.run_stage("search", config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["fractions", "latency_ms"])
def test_only_a_search_meets_them(key, tmp_path):
  config = tiny_config()
  config.budget.fraction = None
  config.budget[key] = (0.9, 0.7) if key == "fractions" else 1.0
  with pytest.raises(vc.UserError, match=f"config.budget.{key}: expected fraction or gmacs here"):
    vc.run_stage("slim", config, tmp_path)


@pytest.mark.parametrize(
  ("asked", "loss", "chosen"),
  [
    ("auto", 0.85, "mean_attention"),
    ("auto", 0.95, "cls"),
    ("auto", float("nan"), "cls"),
    ("value_norm", 0.85, "value_norm"),
  ],
)
def test_a_search_chooses_what_tokens_are_sorted_by(asked, loss, chosen, tmp_path, monkeypatch):
  """The mean attention only where it loses clearly less; a run that goes on knows what it chose."""

  def losses(self, tables, *_):
    return [loss if self.importance == "mean_attention" else 1.0] * len(tables)

  monkeypatch.setattr(SearchTrainer, "_losses", losses)
  config = tiny_config()
  config.search.importance, config.budget.fraction = asked, 0.8
  run = run_stages(from_config_dict(config), tmp_path, ("search",))
  assert {layer.reduce.importance for layer in run.artefacts.layers} == {chosen}
  assert search.trainer(open_run(from_config_dict(config), tmp_path)).importance == chosen


def test_no_other_importance_is_tried_under_a_latency(tmp_path, monkeypatch):
  """Its table holds for the importance that it was measured with."""
  tried = []

  def losses(self, tables, *_):
    tried.append(self.importance)
    return [1.0] * len(tables)

  monkeypatch.setattr(SearchTrainer, "_losses", losses)
  trainer = search.trainer(open_run(from_config_dict(tiny_config()), tmp_path))
  spec = trainer.method.spec
  target = 0.8 * _TABLE.static(spec, spec.dense_layers)
  by_latency = dataclasses.replace(trainer.method, cost=_TABLE, target=target)
  found, _ = dataclasses.replace(trainer, method=by_latency).start(None, None, [{}])
  assert found.importance == "cls" and tried == ["cls"]
