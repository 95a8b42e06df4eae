"""The comparison: one table, resumable, with paired differences and a cloud."""

import copy
import json

import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import random_params
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax import methods
from vitcomp_jax.comparison.methods import file_name, searched_before
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import macs
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.plans import make_plan, save_plan
from vitcomp_jax.training.search import SearchTrainer
from vitcomp_jax.weights import files

_METHODS = ("diffrate", "uniform[importance=value_norm]", "tome")


@pytest.mark.slow
@pytest.mark.parametrize(
  "finetuned",
  [(), ("tome", "dynamicvit", "vit_slim")],
)
def test_a_comparison(finetuned, tmp_path):
  config = tiny_config(w_patch=0.0)
  start = tmp_path / "start.safetensors"
  files.write(vc.load(config.model.variant, num_classes=10)[1], str(start))
  config.model.weights = str(start)
  compare = config.compare
  compare.methods, compare.budgets, compare.seeds = _METHODS, (0.7,), 2
  compare.finetuned, compare.finetune_budgets = finetuned, (0.7,)
  compare.random_schedules, compare.random_examples = 3, 30
  config.finetune.keep_rate_epochs = 0.0
  config.distill.kind, config.distill.tokens = "soft", 0.5
  result = vc.run_stage("compare", config, tmp_path / "run")
  rows = {row["name"]: row for row in result["rows"]}
  _check_again(config, tmp_path, result)
  trained = [f"{name}+finetune@0.7" for name in finetuned]
  assert list(rows) == ["dense", *(f"{name}@0.7" for name in _METHODS), *trained]
  assert len(rows["diffrate@0.7"]["top1_of_seeds"]) == 2
  for name, row in rows.items():
    if name != "dense":
      assert row["gmacs"] == pytest.approx(0.7 * rows["dense"]["gmacs"], rel=0.03)

  folder = tmp_path / "run/compare/outcomes"
  ours, theirs = (np.load(folder / f"{n}@0.7.mean.npz")["loss"] for n in ("diffrate", "tome"))
  difference = theirs - ours
  assert rows["tome@0.7"]["loss_over_reference"] == pytest.approx(difference.mean(), abs=1e-6)
  error = difference.std(ddof=1) / np.sqrt(len(difference))
  assert rows["tome@0.7"]["loss_over_reference_se"] == pytest.approx(error, abs=1e-6)

  lines = (tmp_path / "run/compare/random@0.7.jsonl").read_text().splitlines()
  assert len(lines) == 3 and result["random"]["0.7"]["schedules"] == 3
  cloud = (tmp_path / "run/figures/accuracy.png").read_bytes()
  page = vc.run_stage("visualize", config, tmp_path / "run")
  shown = list(rows)[-1]
  assert all(shown in p.read_text() for p in (page, page.with_suffix(".md")))
  figures = {path.stem for path in (tmp_path / "run/figures").iterdir()}
  assert figures == {"accuracy", "schedule", "token_maps_by_layer", "attention"}
  assert (tmp_path / "run/figures/accuracy.png").read_bytes() == cloud


def _check_again(config, tmp_path, result):
  """The plans that were found give the same figures without a search."""
  config = copy.deepcopy(config)
  config.compare.searched = str(tmp_path / "run/plans")
  config.compare.finetuned, config.compare.random_schedules = (), 0
  again = vc.run_stage("compare", config, tmp_path / "again")
  before = [{k: v for k, v in row.items() if k != "minutes"} for row in result["rows"][:4]]
  assert again["rows"] == before
  assert not list((tmp_path / "again/compare").glob("*/config.json"))


@pytest.mark.slow
def test_searched_widths_are_compared_and_tuned(tmp_path):
  config = tiny_config()
  spec = get_spec(config.model.variant, num_classes=10)
  config.model.weights, compare = str(tmp_path / "w.safetensors"), config.compare
  files.write(random_params(spec), config.model.weights)
  target = 0.7 * macs.static_macs(spec, spec.dense_layers) / 1e9
  plan = tmp_path / "mine.json"
  save_plan(make_plan(spec, methods.within("uniform", spec, target), {"method": "uniform"}), plan)
  compare.methods, compare.budgets = ("diffrate", "diffrate[what=both]"), (0.7,)
  compare.plans, compare.random_schedules = (str(plan),), 0
  compare.finetuned, compare.finetune_budgets = compare.methods, (0.7,)
  config.finetune.trains, config.distill.kind, config.distill.weight = "norms", "features", 1.0
  result = vc.run_stage("compare", config, tmp_path / "run")
  rows = {row["name"]: row for row in result["rows"]}
  searched = [f"{name}@0.7" for name in compare.methods]
  trained = [f"{name}+finetune@0.7" for name in compare.methods]
  assert list(rows) == ["dense", str(plan), *searched, *trained]
  assert rows[str(plan)]["reference"] == searched[0]
  assert rows[trained[1]]["reference"] == trained[0]
  params = [rows[name]["params_m"] for name in ("dense", *searched, *trained)]
  assert params[0] == params[1] == params[3] > params[2] == params[4]
  for name, before in zip(trained, searched, strict=True):
    assert rows[name]["loss"] != rows[before]["loss"]
    assert rows[name]["minutes"] >= rows[before]["minutes"]
  # What was found is trained, not searched again.
  folders = {path.parent.name for path in (tmp_path / "run/compare").glob("*/config.json")}
  assert folders == {"diffrate@0.7-seed0", "diffrate(what=both)@0.7-seed0"}

  # Rows can be added later, and measured ones are kept.
  compare.methods += ("tome",)
  more = {row["name"]: row for row in vc.run_stage("compare", config, tmp_path / "run")["rows"]}
  assert {name: more[name] for name in rows} == rows and set(more) - set(rows) == {"tome@0.7"}
  # Without a trained search in the table, the reference is the row before training.
  compare.methods = compare.finetuned = ("diffrate[what=both]",)
  alone = {row["name"]: row for row in vc.run_stage("compare", config, tmp_path / "run")["rows"]}
  assert alone[trained[1]]["reference"] == searched[1]
  with pytest.raises(vc.UserError, match="made with another config .config.compare.methods"):
    compare.methods = ()
    vc.run_stage("visualize", config, tmp_path / "run")
  config.compare.seeds = 2
  with pytest.raises(vc.UserError, match="made with another config .config.compare.seeds"):
    vc.run_stage("compare", config, tmp_path / "run")
  compare.methods = ("diffrate[what=both]",)

  compare.plans += (str(tmp_path / "run/plans/diffrate[what=both]@0.7-seed0.json"),)
  with pytest.raises(vc.UserError, match="config.compare.plans: expected plans of tokens, got"):
    vc.run_stage("compare", config, tmp_path / "again")
  compare.plans, compare.searched = compare.plans[:1], str(tmp_path / "run/plans")
  with pytest.raises(vc.UserError, match="expected plans of tokens, got .*what=both"):
    vc.run_stage("compare", config, tmp_path / "again")


@pytest.mark.slow
def test_a_search_with_options_is_resumed(tmp_path, monkeypatch):
  config = tiny_config()
  config.compare.methods, config.compare.budgets = ("diffrate[actions=merge]",), (0.8,)
  config.compare.seeds, config.compare.random_schedules, config.compare.finetuned = 1, 0, ()
  with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
    patch.setattr(SearchTrainer, "choose", lambda *_: 1 / 0)
    vc.run_stage("compare", config, tmp_path / "run")
  rows = vc.run_stage("compare", config, tmp_path / "run")["rows"]
  assert [row["name"] for row in rows] == ["dense", "diffrate[actions=merge]@0.8"]


def test_without_a_search_the_first_plan_is_the_reference(tmp_path):
  config = tiny_config()
  spec = get_spec(config.model.variant, num_classes=10)
  layers = methods.within("uniform", spec, 0.8 * macs.static_macs(spec, spec.dense_layers) / 1e9)
  plan = tmp_path / "mine.json"
  save_plan(make_plan(spec, layers, {"method": "uniform"}), plan)
  config.model.weights = str(tmp_path / "w.safetensors")
  files.write(random_params(spec), config.model.weights)
  config.compare.plans, config.compare.methods = (str(plan),), ("tome",)
  config.compare.budgets, config.compare.random_schedules = (0.8,), 0
  rows = {row["name"]: row for row in vc.run_stage("compare", config, tmp_path / "run")["rows"]}
  assert list(rows) == ["dense", str(plan), "tome@0.8"]
  mine, tome = rows[str(plan)], rows["tome@0.8"]
  dense = rows["dense"]
  assert mine["loss_over_dense"] == pytest.approx(mine["loss"] - dense["loss"], abs=1e-5)
  assert mine["loss_over_dense_se"] > 0 and "loss_over_dense" not in dense
  assert "reference" not in mine and tome["reference"] == str(plan)

  # A plan that has changed since is measured again.
  save_plan(make_plan(spec, spec.dense_layers, {}), plan)
  config.compare.methods = ("tome", "evit")
  rows = {row["name"]: row for row in vc.run_stage("compare", config, tmp_path / "run")["rows"]}
  assert rows[str(plan)]["loss"] == rows["dense"]["loss"] != mine["loss"]
  assert tome["loss_over_reference"] == pytest.approx(tome["loss"] - mine["loss"], abs=1e-5)
  assert f"the references are {plan}" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_the_cloud_is_what_the_static_schedules_give(tmp_path):
  config = tiny_config()
  spec = get_spec(config.model.variant, num_classes=10)
  config.model.weights = str(tmp_path / "w.safetensors")
  # Of a fresh model's tokens many are so alike that rounding decides which ones merge.
  files.write(random_params(spec), config.model.weights)
  config.compare.budgets, config.compare.random_schedules = (0.8,), 2
  config.compare.random_examples = 40
  vc.run_stage("compare", config, tmp_path / "run")
  path = tmp_path / "run/compare/random@0.8.jsonl"
  points = [json.loads(line) for line in path.read_text().splitlines()]
  target = 0.8 * macs.static_macs(spec, spec.dense_layers) / 1e9
  drawn = methods.handmade.random_counts(spec, target, 2, 0)
  for i, (point, layers) in enumerate(zip(points, drawn, strict=True)):
    assert point["gmacs"] == pytest.approx(macs.static_macs(spec, layers) / 1e9)
    plan = tmp_path / "plan.json"
    vc.plans.save_plan(vc.plans.make_plan(spec, layers, {}), plan)
    config.model.plan, config.evaluate.dense = str(plan), False
    row = vc.run_stage("evaluate", config, tmp_path / f"evaluated-{i}")["rows"][0]
    assert point["loss"] == pytest.approx(row["loss"], abs=1e-4)


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("methods", ("best",), "config.compare.methods: expected some of diffrate, uniform"),
    ("methods", ("diffrate[",), r"such as diffrate\[importance=cls\], got 'diffrate\['"),
    ("methods", ("tome[impotance=cls]",), "did you mean config.search.importance"),
    ("methods", ("tome[importance=best]",), "config.search.importance: expected one of auto, cls"),
    ("searched", "nowhere", r"expected plans diffrate@0.8-seed\*.json in nowhere, got none"),
    ("methods", ("dynamicvit",), "dynamicvit has to be trained"),
    ("finetuned", ("fastest",), "config.compare.finetuned: expected some of diffrate, vit_slim"),
    ("plans", ("diffrate/deit_small@2.9",), "expected 3 layers"),
    ("budgets", (0.8, 0.01), r"config.budget: expected 0\.\d+ to .*, from the smallest plan"),
    ("finetune_budgets", (0.01,), "from the smallest plan to the dense model"),
    ("methods", ("diffrate[recipe=paper,what=both]",), "config.search.what: expected tokens"),
  ],
)
def test_what_cannot_be_compared_is_refused(key, value, said, tmp_path):
  config = tiny_config()
  config.compare.methods = config.compare.finetuned = ("diffrate",)
  config.compare[key] = value
  with pytest.raises(vc.UserError, match=said):
    vc.run_stage("compare", config, tmp_path)


def test_the_files_of_rows(tmp_path):
  names = [file_name(f"diffrate[data.dir=/photos]@0.5-seed{seed}.json") for seed in (10, 9, 2)]
  for name in names:
    (tmp_path / name).touch()
  config = tiny_config()
  config.compare.searched = str(tmp_path)
  found = searched_before(from_config_dict(config), "diffrate[data.dir=/photos]", 0.5)
  assert [path.name for path in found] == names[::-1]
