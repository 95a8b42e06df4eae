"""A sixth method is one file and one line: plans, stages and figures know it by its own words."""

import pytest

import vitcomp_jax as vc
from tests.methods import toy
from tests.models import forward, random_images, random_params, small_spec
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods import registry
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.plans import make_plan, parse_plan, save_plan


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setattr(registry, "METHODS", [*registry.METHODS, toy.METHOD])


@pytest.fixture
def spec(monkeypatch):
  spec = small_spec(image_size=(40, 40), depth=3, num_classes=10)
  monkeypatch.setitem(VARIANTS, spec.name, spec)
  return spec


def test_it_meets_a_budget_and_is_a_plan(spec):
  target = 0.7 * macs.static_macs(spec, spec.dense_layers) / 1e9
  layers = registry.within("keep_short", spec, target)
  plan = make_plan(spec, layers, {"method": "keep_short"})
  assert plan.gmacs == pytest.approx(target, rel=0.01)
  written = plan.to_json()
  assert written["layers"][1]["reduce"] == {"type": "keep_short", "keep": layers[1].reduce.keep}
  assert parse_plan(written).layers_for(spec) == layers
  out = forward(spec, layers, {"params": random_params(spec)}, random_images(spec, 2))
  assert out.tokens.x.shape[1] == layers[1].reduce.keep


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({"keep": 0}, "expected a whole number from 1 to .* for keep, got 0"),
    ({"keep": 9, "share": 1.5}, "expected share in"),
    ({"keep": 9, "size": 1}, r"expected options of keep_short \(keep, share\), got 'size'"),
    ({}, "keep_short needs keep, got none"),
    ({"keep": 1000}, "expected keep from 2 to 101, got 1000"),
  ],
)
def test_its_json_is_checked_by_its_fields(values, said, spec):
  written = make_plan(spec, spec.dense_layers, {}).to_json()
  written["layers"][2]["reduce"] = {"type": "keep_short", **values}
  with pytest.raises(UserError, match=said):
    parse_plan(written)


def test_stages_evaluate_and_draw_it(spec, tmp_path):
  target = 0.8 * macs.static_macs(spec, spec.dense_layers) / 1e9
  plan = make_plan(spec, registry.within("keep_short", spec, target), {"method": "keep_short"})
  save_plan(plan, tmp_path / "plan.json")
  config = {"stages": ("evaluate", "visualize")}
  config["model"] = {"variant": spec.name, "plan": str(tmp_path / "plan.json")}
  config["data"] = {"name": "bundled", "eval_examples": 8}
  config["evaluate"] = {"baselines": ("uniform",), "batch_size": 8, "token_maps": 1}
  result = vc.run_stage("evaluate", from_config_dict(config), tmp_path / "run")
  assert [row["name"] for row in result["rows"]] == ["dense", "keep_short", "uniform"]
  vc.run_stage("visualize", from_config_dict(config), tmp_path / "run")
  figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
  assert {"schedule.png", "token_maps.png", "token_maps_by_layer.png"} <= figures
  config["model"]["plan"], config["budget"] = None, {"fraction": 0.8}
  config["evaluate"] |= {"baselines": ("keep_short",)}
  result = vc.run_stage("evaluate", from_config_dict(config), tmp_path / "baseline")
  assert [row["name"] for row in result["rows"]] == ["dense", "keep_short"]
