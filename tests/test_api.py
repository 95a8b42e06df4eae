"""The Python API: load, apply, plans by name, cost, and the stages as functions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from vitcomp_jax.config import default_config
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.reducers import PruneMerge
from vitcomp_jax.plans import parse_plan

MINI = "vit_mini_patch3_30"


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(0), (3, 30, 30, 3))


def mini_plan(keep=60):
  layers = [{"prune_keep": 101 - 4 * i, "merge_keep": keep} for i in range(8)]
  values = {"format": "vitcomp-plan", "version": 1, "variant": MINI, "num_tokens": 101}
  return parse_plan({**values, "layers": layers})


def test_equal_plans_compile_once(images):
  _, params = vc.load(MINI, "bundled")
  before = vc.apply._cache_size()
  for keep in (60, 60, 50):
    model, _ = vc.load(MINI, plan=mini_plan(keep))
    vc.apply(model, params, images)
  assert vc.apply._cache_size() == before + 2


def test_the_model_is_an_ordinary_flax_module(images):
  model, params = vc.load(MINI, "bundled", mini_plan())
  logits = vc.apply(model, params, images)
  assert logits.shape == (3, 10)
  np.testing.assert_allclose(model.apply({"params": params}, images), logits, atol=1e-5)


def test_a_plan_comes_by_name_path_or_value(tmp_path):
  by_name, _ = vc.load("deit_tiny_patch16_224", plan="diffrate/deit_tiny@0.8")
  by_value, _ = vc.load("deit_tiny_patch16_224", plan=vc.load_plan("diffrate/deit_tiny@0.8"))
  path = tmp_path / "plan.json"
  path.write_text(json.dumps(vc.load_plan("diffrate/deit_tiny@0.8").to_json()))
  by_path, _ = vc.load("deit_tiny_patch16_224", plan=str(path))
  assert by_name == by_value == by_path
  assert isinstance(by_name.layers[3].reduce, PruneMerge)
  assert vc.count_cost(by_name).gmacs == pytest.approx(vc.load_plan("diffrate/deit_tiny@0.8").gmacs)


def test_no_classes_gives_the_pooled_features(images):
  model, params = vc.load(MINI, "bundled", num_classes=0)
  dense, whole = vc.load(MINI, "bundled")
  features = dense.apply({"params": whole}, images, method="forward").features
  assert "head" not in params
  np.testing.assert_allclose(vc.apply(model, params, images), features, atol=1e-5)


def test_another_number_of_classes_gives_a_fresh_head(images):
  model, params = vc.load(MINI, "bundled", num_classes=7)
  _, whole = vc.load(MINI, "bundled")
  assert vc.apply(model, params, images).shape == (3, 7)
  np.testing.assert_array_equal(params["norm"]["scale"], whole["norm"]["scale"])


def test_another_image_size_resamples_the_positions():
  model, params = vc.load(MINI, "bundled", image_size=36)
  assert params["pos_embed"].shape == (1, 145, 64)
  assert vc.apply(model, params, jnp.zeros((1, 36, 36, 3))).shape == (1, 10)
  with pytest.raises(UserError, match="multiple of the patch size"):
    vc.load(MINI, "bundled", image_size=31)


def test_stages_are_functions_that_return_what_they_write(tmp_path, optax_promotion):
  config = default_config()
  config.model.variant, config.model.weights, config.data.pad = MINI, "bundled", 1
  config.budget.fraction = 0.7
  config.search.steps, config.search.batch_size, config.search.choose_images = 2, 4, 8
  config.data.eval_examples, config.evaluate.batch_size = 20, 10
  plan = vc.search(config, tmp_path)
  assert plan == vc.load_plan(tmp_path / "plan.json")
  assert plan.gmacs == pytest.approx(0.7 * vc.count_cost(vc.load(MINI)[0]).gmacs, rel=0.01)
  result = vc.evaluate(config, tmp_path)
  assert [row["name"] for row in result["rows"]] == ["dense", "diffrate"]
  assert result == json.loads((tmp_path / "result.json").read_text())
  assert (tmp_path / "report.md").exists()
