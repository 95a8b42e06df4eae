"""Slimming, re-training and searching rates on what was slimmed, as runs on a tiny model."""

import jax
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.weights import files


@pytest.fixture(autouse=True)
def tiny_variant(monkeypatch, optax_promotion):
  monkeypatch.setitem(VARIANTS, TINY, tiny_spec())


def tiny_config(**slim):
  config = vc.default_config()
  config.model.variant, config.data.pad = TINY, 1
  config.data.train_examples, config.data.eval_examples = 80, 40
  config.evaluate.batch_size, config.evaluate.token_maps = 20, 1
  config.budget.fraction = 0.6
  for group in (config.slim, config.finetune):
    group.epochs, group.batch_size, group.warmup_epochs, group.log_every = 1.0, 16, 0.0, 1
    group.learning_rate = 1e-2
  config.search.steps, config.search.batch_size, config.search.choose_images = 4, 16, 16
  config.slim.min_units = 2
  for key, value in slim.items():
    config.slim[key] = value
  return config


@pytest.mark.slow
def test_a_slimmed_network_is_what_the_masks_leave(tmp_path):
  config = tiny_config(w_patch=0.0, mask_learning_rate=0.05)
  config.evaluate.masked = config.evaluate.before_finetune = True
  config.distill.kind = "soft"
  plan = vc.run_stage("slim", config, tmp_path)
  assert plan == vc.load_plan(tmp_path / "plan.json") and plan.made_by["method"] == "vit_slim"
  dense_cost = vc.count_cost(vc.load(TINY)[0]).gmacs
  assert plan.gmacs == pytest.approx(0.6 * dense_cost, rel=0.02)  # a unit is 1 % of this model

  slimmed, params = vc.load(TINY, tmp_path / "slimmed.safetensors", plan, num_classes=10)
  from_dense = vc.load(TINY, tmp_path / "searched.safetensors", plan, num_classes=10)[1]
  jax.tree.map(np.testing.assert_array_equal, params, from_dense)

  path = vc.run_stage("finetune", config, tmp_path)
  retrained = vc.load(TINY, path, plan, num_classes=10)[1]
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, retrained)
  assert all(jax.tree.leaves(moved["blocks_0"]["mlp"]))

  rows = {row["name"]: row for row in vc.run_stage("evaluate", config, tmp_path)["rows"]}
  before, masked = (rows.pop(f"vit_slim@{what}") for what in ("before_finetune", "masked"))
  assert before["loss"] == pytest.approx(masked["loss"], abs=1e-5)
  assert before["gmacs"] < masked["gmacs"] == rows["dense"]["gmacs"]
  cost = vc.count_cost(slimmed)
  assert rows["vit_slim"]["params_m"] == pytest.approx(cost.params / 1e6, abs=1e-4)
  report = (tmp_path / "report.md").read_text()
  assert "## Slimming" in report and "hidden units" in report and "Tokens after" not in report
  figures = {p.name for p in (tmp_path / "figures").iterdir()}
  names = ("accuracy", "masks", "units", "widths")
  assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_frozen_masks_and_weights_stay(tmp_path):
  start = tmp_path / "start.safetensors"
  files.write(vc.load(TINY, num_classes=10)[1], str(start))
  config = tiny_config(w_mlp=0.0, freeze_weights=True, budgets=(0.7, 0.5, 0.8))
  config.model.weights = str(start)
  vc.run_stage("slim", config, tmp_path / "run")
  masks = files.read(str(tmp_path / "run" / "masks.safetensors"))
  for i in range(3):
    assert np.all(masks[f"blocks.{i}.mlp.zeta"] == 1)
    assert np.any(masks[f"blocks.{i}.attn.zeta"] != 1)
    assert np.any(masks[f"blocks.{i}.attn.patch_zeta"] != 3)
  before, after = files.read(str(start)), files.read(str(tmp_path / "run/searched.safetensors"))
  changed = {name for name in before if np.any(before[name] != after[name])}
  assert changed == {name for name in before if "norm" in name}


@pytest.mark.slow
def test_one_search_serves_many_budgets(tmp_path):
  first = vc.run_stage("slim", tiny_config(budgets=(0.8, 0.8, 0.8)), tmp_path / "first")
  config = tiny_config(budgets=(0.5, 0.5, 0.5), masks=str(tmp_path / "first/masks.safetensors"))
  config.model.weights = str(tmp_path / "first/searched.safetensors")
  second = vc.run_stage("slim", config, tmp_path / "second")
  assert second.gmacs < first.gmacs and not (tmp_path / "second/metrics.jsonl").exists()
  for wide, narrow in zip(first.indices, second.indices, strict=True):
    assert set(np.ravel(narrow.attn)) <= {*np.ravel(wide.attn), -1}
    assert set(narrow.mlp) <= set(wide.mlp)
  rows = vc.run_stage("evaluate", config, tmp_path / "second")["rows"]
  assert [row["name"] for row in rows] == ["dense", "vit_slim"]
  assert "An earlier search's masks" in (tmp_path / "second/report.md").read_text()
  config.slim.attn = "heads"
  with pytest.raises(vc.UserError, match="config.slim.masks: expected the masks of"):
    vc.run_stage("slim", config, tmp_path / "third")


def _search_slimmed(workdir):
  """Searches token counts of a slimmed network; returns the config."""
  config = tiny_config(w_patch=0.0, budgets=(0.7, 0.7, 1.0))
  slim = vc.run_stage("slim", config, workdir)
  both = vc.run_stage("search", config, workdir)
  assert both.indices == slim.indices and both.made_by["method"] == "vit_slim+diffrate"
  assert both.gmacs < slim.gmacs
  return config


@pytest.mark.slow
def test_widths_and_token_counts_in_one_plan(tmp_path):
  _search_slimmed(tmp_path)


@pytest.mark.slow
def test_widths_and_token_counts_are_trained_and_evaluated(tmp_path):
  config = _search_slimmed(tmp_path)
  vc.run_stage("finetune", config, tmp_path)
  rows = vc.run_stage("evaluate", config, tmp_path)["rows"]
  assert [row["name"] for row in rows] == ["dense", "vit_slim", "diffrate", "vit_slim+diffrate"]
  assert rows[3]["gmacs"] < min(rows[1]["gmacs"], rows[2]["gmacs"])
  assert "after merging" in (tmp_path / "report.md").read_text()

  config = tiny_config()
  config.model.plan = str(tmp_path / "plan.json")
  config.model.weights = str(tmp_path / "finetuned.safetensors")
  with pytest.raises(vc.UserError, match="config.evaluate.dense: expected False"):
    vc.run_stage("evaluate", config, tmp_path / "again")
  config.evaluate.dense = False
  again = vc.run_stage("evaluate", config, tmp_path / "again")["rows"]
  assert again == [row for row in rows if row["name"].startswith("vit_slim")]


def test_token_counts_need_all_patches(tmp_path):
  config = tiny_config()
  config.stages = ("slim", "search")
  with pytest.raises(vc.UserError, match="slim with config.slim.w_patch=0"):
    vc.run_stage("search", config, tmp_path)
  config.stages = ("slim",)
  config.slim.budgets = (1.0, 1.0, 0.5)
  vc.run_stage("slim", config, tmp_path)
  with pytest.raises(vc.UserError, match="slim with config.slim.w_patch=0"):
    vc.run_stage("search", config, tmp_path)


def test_equal_widths_are_written_for_timm(tmp_path):
  config = tiny_config(attn="heads", w_attn=0.0, w_mlp=0.0, w_patch=0.0, budgets=(1.0, 1.0, 1.0))
  config.slim.epochs = 0.1
  vc.run_stage("slim", config, tmp_path)
  written = files.read(str(tmp_path / "timm.safetensors"))
  for name, values in files.read(str(tmp_path / "slimmed.safetensors")).items():
    np.testing.assert_array_equal(written[name], values)


@pytest.mark.parametrize(
  ("slim", "said"),
  [
    ({"budgets": (0.5, 0.5)}, "expected shares of attn, mlp, patch, got 2"),
    ({"budgets": (0.5, 0.01, 1.0), "min_units": 0}, "hidden unit in every layer.* searched anew"),
    (
      {"w_attn": 0.0, "w_patch": 0.0},
      "config.budget: expected at least .* GMACs, what the smallest cut",
    ),
    ({"masks": "/nowhere/masks.safetensors"}, "not there"),
    ({"budgets": (0.5, 0.5, 0.0)}, "config.slim.budgets: expected float of more than 0"),
  ],
)
def test_what_cannot_be_cut_is_refused(slim, said, tmp_path):
  with pytest.raises(vc.UserError, match=said):
    vc.run_stage("slim", tiny_config(**slim), tmp_path)
