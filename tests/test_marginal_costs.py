"""The tool that measures marginal costs at a searched plan."""

import json

import jax
import numpy as np
import pytest

import vitcomp_jax as vc
from tests import tiny_config
from tests.tiny_main import TINY, tiny_spec
from tools import marginal_costs
from vitcomp_jax.config import DiffRateOptions, from_config_dict
from vitcomp_jax.methods.diffrate.rates import ShareRates
from vitcomp_jax.models.variants import VARIANTS


def test_costs_are_ratios_of_gradients_with_their_error():
  spec = tiny_spec()
  rates = ShareRates(spec, DiffRateOptions(what="both"))
  table = rates.clipped(np.array([[25, 25, 32, 8, 8], [20, 15, 8, 4, 2], [1, 1, 32, 8, 8]]))
  macs = jax.tree.map(lambda x: 2.0 + 0 * x, rates.arch(table))
  macs["blocks_1"]["reduce"]["prune"] = 0.0  # to prune instead of to merge saves nothing more
  # Shares as gradients of the task, and twice as large ones for the second batch.
  gradients = [(jax.tree.map(lambda x, k=k: -k * x, rates.arch(table)), macs) for k in (1, 2)]
  found = marginal_costs.rows(spec, rates, table, gradients)
  of_second = [row for row in found if row["layer"] == 2]
  kept = {row["kind"]: (row["kept"], row["of"]) for row in of_second}
  assert kept == {
    "pruned": (20, 25),
    "merged": (15, 20),
    "hidden": (8, 32),
    "qk": (4, 8),
    "value": (2, 8),
  }
  costs = {row["kind"]: (row["cost"], row["se"]) for row in of_second}
  # Means of k * share / 2 for k of 1 and 2, whose standard error is half of their difference.
  expected = {"pruned": 1.4, "merged": 0.6, "hidden": 0.25, "qk": 0.5, "value": 0.25}
  for kind, share in expected.items():
    assert costs[kind] == pytest.approx((1.5 * share / 2, share / 4))
  # Neither the first layer nor the last one, of which the head reads CLS only, learns its tokens.
  assert {row["kind"] for row in found if row["layer"] != 2} == {"hidden", "qk", "value"}


@pytest.mark.slow
def test_a_workdir_of_a_search_is_measured(tmp_path, monkeypatch, capsys, optax_promotion):
  monkeypatch.setitem(VARIANTS, TINY, tiny_spec())
  config, file = tiny_config.get_config(), tmp_path / "found.json"
  config.search.what, config.search.steps, config.search.calibration_images = "both", 4, 32
  plan = vc.run_stage("search", from_config_dict(config), tmp_path / "run")
  options = ["--images", "48", "--json", str(file)]
  assert marginal_costs.main([str(tmp_path / "run"), *options]) == 0
  found = json.loads(file.read_text())
  assert (found["variant"], found["images"], found["gmacs"]) == (TINY, 48, round(plan.gmacs, 6))
  widths = {(row["layer"], row["kind"]): row["kept"] for row in found["rows"]}
  for number, layer in enumerate(plan.layers_for(tiny_spec()), 1):
    assert widths[number, "hidden"] == layer.mlp_dim
    assert widths[number, "qk"] == layer.head_dim
  assert all(np.isfinite([row["cost"], row["se"]]).all() for row in found["rows"])
  assert any(row["cost"] for row in found["rows"])
  assert len(capsys.readouterr().out.splitlines()) == len(found["rows"])


def test_a_folder_without_a_search_is_refused(tmp_path, capsys):
  assert marginal_costs.main([str(tmp_path)]) == 2
  assert f"{tmp_path}: expected the workdir of a run" in capsys.readouterr().err
