"""Searches of widths: from Python, as runs, and cut off."""

import itertools
import json
import types

import jax
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import random_images, random_params
from tests.stages.test_slim import TINY, tiny_config, tiny_variant  # noqa: F401
from tests.tiny_main import tiny_spec
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.models.build import build
from vitcomp_jax.models.spec import removes_tokens
from vitcomp_jax.runs.inputs import Inputs
from vitcomp_jax.stages import search_checks

SPEC = tiny_spec()
IMAGES = np.random.default_rng(0).integers(0, 256, (24, *SPEC.image_size, 3), dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["widths", "both"])
def test_a_plan_brings_its_weights(what, tmp_path):
  model, params = build(SPEC, SPEC.dense_layers), random_params(SPEC)
  options = {"steps": 1, "batch_size": 8, "choose_images": 8, "calibration_images": 8}
  plan = vc.search(model, params, IMAGES, macs=0.5, what=what, **options)
  assert plan.has_own_widths and [each.step for each in plan.history] == [0, 1]
  assert removes_tokens(plan.layers_for(SPEC)) == (what == "both")
  small, weights = vc.compress(model, params, plan)
  jax.tree.map(np.testing.assert_array_equal, weights, dict(plan.params))
  share = vc.count_cost(small).gmacs / vc.count_cost(model).gmacs
  assert share == pytest.approx(0.5, abs=0.02)
  images = np.asarray(random_images(SPEC, 2))
  logits = vc.apply(small, weights, images)
  vc.save(tmp_path / "model", small, weights)
  again, same = vc.load(tmp_path / "model")
  assert again == small
  np.testing.assert_array_equal(vc.apply(again, same, images), logits)


def _config(what):
  config = tiny_config()
  config.budget.fraction, config.search.what = 0.5, what
  config.search.calibration_images = 16
  config.search.log_every = config.search.checkpoint_every = 1
  return config


def _weights(workdir):
  """Returns the searched model and its weights, as a user reads them from a run."""
  plan = workdir / "plan.json"
  return vc.load(TINY, workdir / "slimmed.safetensors", plan, num_classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["widths", "both"])
def test_a_run_evaluates_what_it_searched(what, tmp_path):
  plan = vc.run_stage("search", _config(what), tmp_path)
  assert plan == vc.load_plan(tmp_path / "plan.json") and plan.has_own_widths
  widths = [record["widths"] for record in read_metrics(tmp_path, "search")]
  assert np.shape(widths) == (4, SPEC.depth, 3)
  small, params = _weights(tmp_path)
  cost = vc.count_cost(small)
  rows = {row["name"]: row for row in vc.run_stage("evaluate", _config(what), tmp_path)["rows"]}
  found = rows["diffrate"]
  assert found["gmacs"] == pytest.approx(cost.gmacs, abs=1e-6)
  assert found["params_m"] == pytest.approx(cost.params / 1e6, abs=1e-4)
  assert cost.gmacs == pytest.approx(0.5 * rows["dense"]["gmacs"], rel=0.02)
  assert found["loss"] != rows["dense"]["loss"]
  counts = json.loads((tmp_path / "finished/search.json").read_text())["raw_counts"]
  assert (counts[1] == [SPEC.num_tokens] * 2) == (what == "widths")
  assert ("Tokens after" in (tmp_path / "report.md").read_text()) == (what == "both")


@pytest.mark.slow
@pytest.mark.parametrize("given_batches", [1, 4, 6])  # choosing a start, a step, a plan
def test_a_search_goes_on_where_it_was_cut_off(given_batches, tmp_path, monkeypatch):
  alone, cut = tmp_path / "alone", tmp_path / "cut"
  plan = vc.run_stage("search", _config("both"), alone)
  given, batches = itertools.count(), Inputs.train_batches

  def cut_off(self, batch_size, start_step):
    for batch in batches(self, batch_size, start_step):
      if next(given) == given_batches:
        raise KeyboardInterrupt
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(Inputs, "train_batches", cut_off)
    with pytest.raises(KeyboardInterrupt):
      vc.run_stage("search", _config("both"), cut)
  assert not (cut / "plan.json").exists() and not (cut / "slimmed.safetensors").exists()
  assert vc.run_stage("search", _config("both"), cut) == plan
  for name in ("plan.json", "slimmed.safetensors"):
    assert (cut / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"fractions": (0.9, 0.8)}, "with 2 budgets, each of which has weights of its own, got both"),
    ({"stages": ("slim", "search")}, "with the stage slim, which trains other widths, got both"),
    ({"processes": 2}, "with 2 processes, got both"),
    ({"recipe": "paper"}, "got both with recipe=paper, which searches tokens only"),
  ],
)
def test_runs_that_cannot_keep_the_weights_are_refused(changes, said, tmp_path, monkeypatch):
  config = _config("both")
  config.slim.w_patch = 0.0
  config.stages = changes.get("stages", ("search",))
  config.search.recipe = changes.get("recipe", "ours")
  if "fractions" in changes:
    config.budget.fraction, config.budget.fractions = None, changes["fractions"]
  if "processes" in changes:
    monkeypatch.setattr(search_checks, "jax", types.SimpleNamespace(process_count=lambda: 2))
  with pytest.raises(vc.UserError, match=f"config.search.what: expected tokens.* {said}"):
    vc.run_stage("search", config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
