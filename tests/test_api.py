"""The Python API: load, apply, plans by name, cost, and the stages as functions."""

import dataclasses
import functools
import json

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import vitcomp_jax as vc
from tests.models import random_params
from tests.weights.test_hub import make_hub_cache
from vitcomp_jax import api
from vitcomp_jax.config import default_config
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.plans import parse_plan
from vitcomp_jax.weights import files, loading
from vitcomp_jax.weights.checkpoint import open_checkpoint
from vitcomp_jax.weights.positions import resample_positions

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
  api._apply.clear_cache()  # of plans of other tests, which may be equal
  for keep in (60, 60, 50):
    model, _ = vc.load(MINI, "bundled", mini_plan(keep))
    vc.apply(model, params, images)
  assert api._apply._cache_size() == 2


def test_the_model_is_an_ordinary_flax_module(images):
  model, params = vc.load(MINI, "bundled", mini_plan())
  logits = vc.apply(model, params, images)
  assert logits.shape == (3, 10)
  expected = jax.jit(model.apply)({"params": params}, images)
  np.testing.assert_allclose(expected, logits, atol=1e-5)


def test_a_plan_comes_by_name_path_or_value(tmp_path, monkeypatch):
  monkeypatch.setattr(loading, "load_params", lambda *_, **__: {})  # to make them takes seconds
  variant, name = "deit_tiny_patch16_224", "diffrate/deit_tiny@0.8"
  path = tmp_path / "plan.json"
  path.write_text(json.dumps(vc.load_plan(name).to_json()))
  by_name, _ = vc.load(variant, plan=name)
  by_value, _ = vc.load(variant, plan=vc.load_plan(name))
  by_path, _ = vc.load(variant, plan=str(path))
  assert by_name == by_value == by_path
  assert isinstance(by_name.layers[3].reduce, PruneMerge)
  assert vc.count_cost(by_name).gmacs == pytest.approx(vc.load_plan(name).gmacs)


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


@pytest.fixture
def weights_of(tmp_path):
  """Writes the bundled weights, changed, as other libraries do."""

  def write(change):
    state = files.read(loading.bundled_weights(MINI))
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(change(state), path)
    return path, state

  return write


def seven(state):
  head = {name: np.ascontiguousarray(state[name][:7]) for name in ("head.weight", "head.bias")}
  return state | head


def test_the_weights_say_how_many_classes_there_are(images, weights_of, caplog):
  path, state = weights_of(seven)
  model, params = vc.load(MINI, path)
  assert model.spec.num_classes == 7 and not caplog.records
  np.testing.assert_array_equal(params["head"]["kernel"], state["head.weight"][:7].T)
  model, params = vc.load(MINI, path, num_classes=3)
  assert vc.apply(model, params, images).shape == (3, 3)
  assert "classifier (7) is replaced by a random one of 3 classes" in caplog.text


def test_weights_without_classifier_give_features_and_say_so(images, weights_of, caplog):
  path, _ = weights_of(lambda state: {k: v for k, v in state.items() if "head" not in k})
  model, params = vc.load(MINI, path)
  assert model.spec.num_classes == 0 and vc.apply(model, params, images).shape == (3, 64)
  assert "have no classifier" in caplog.text


def test_a_classifier_is_kept_where_the_variant_has_none(weights_of):
  path, state = weights_of(seven)
  VARIANTS["headless"] = dataclasses.replace(vc.get_spec(MINI), name="headless", num_classes=0)
  try:
    model, params = vc.load("headless", path)
  finally:
    del VARIANTS["headless"]
  assert model.spec.num_classes == 7
  np.testing.assert_array_equal(params["head"]["bias"], state["head.bias"][:7])


@pytest.mark.parametrize("num_classes", [None, 7])
def test_a_file_is_looked_at_before_anything_is_built(num_classes, monkeypatch):
  def never(*_):
    raise AssertionError

  monkeypatch.setattr(loading, "build", never)
  with pytest.raises(UserError, match="are not there"):
    vc.load("deit_base_patch16_224", "/nowhere/w.safetensors", num_classes=num_classes)


def test_no_random_parameters_are_made_where_the_weights_bring_all(monkeypatch):
  monkeypatch.setattr(jax, "jit", lambda *_: pytest.fail("compiled something random"))
  vc.load(MINI, "bundled", num_classes=10)


def test_positions_of_an_oblong_grid_are_taken_as_they_are(tmp_path):
  path = tmp_path / "weights.safetensors"
  spec = vc.get_spec(MINI, image_size=(60, 15))
  params = random_params(spec)
  files.write(params, str(path))  # without a word on the grid: 20 x 5 could be 10 x 10
  _, same = vc.load(MINI, path, image_size=(60, 15))
  np.testing.assert_array_equal(same["pos_embed"], params["pos_embed"])
  loading.save_params(spec, params, path)
  model, same = vc.load(MINI, path)
  assert model.spec.image_size == (60, 15)
  np.testing.assert_array_equal(same["pos_embed"], params["pos_embed"])
  _, turned = vc.load(MINI, path, image_size=(15, 60))
  expected = resample_positions(np.asarray(params["pos_embed"]), 1, (20, 5), (5, 20), True)
  np.testing.assert_array_equal(turned["pos_embed"], expected)


def test_the_image_size_is_the_weights(tmp_path, caplog):
  caplog.set_level("INFO")
  files.write(
    random_params(vc.get_spec(MINI, image_size=36)), str(tmp_path / "weights.safetensors")
  )
  model, _ = vc.load(MINI, tmp_path / "weights.safetensors")
  assert model.spec.image_size == (36, 36) and "for images of 36 x 36 pixels" in caplog.text


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
  """Keeps a head's weights in a local hub cache under an id."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  return functools.partial(make_hub_cache, tmp_path)


def test_preprocessing_is_that_of_a_hub_ids_tag(on_the_hub, caplog):
  dino, plain = "timm/vit_base_patch16_224.dino", "timm/vit_base_patch16_224.mine"
  clip = "timm/vit_base_patch16_clip_quickgelu_224.openai"
  for hub_id in (dino, plain, clip):
    on_the_hub(hub_id)
  variant = vc.get_spec("vit_base_patch16_224")
  for weights in (dino, f"hf-hub:{dino}"):
    spec = loading.spec_for("vit_base_patch16_224", weights)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) != variant.mean
  assert spec.num_classes == 2  # the weights', whatever timm's have
  assert not caplog.records
  assert loading.spec_for("vit_base_patch16_224", plain).mean == variant.mean
  assert "has no such tag" in caplog.text and plain in caplog.text
  with pytest.raises(UserError, match="give that variant"):
    loading.spec_for("vit_base_patch16_clip_224", clip)


@pytest.mark.parametrize("size", [(30,), "30", 30.0, (30, 30.0)])
def test_an_image_size_that_is_none_is_refused(size):
  with pytest.raises(UserError, match="expected a whole number of pixels, or height and width"):
    vc.load(MINI, image_size=size)


@pytest.mark.parametrize("num_classes", [1.5, "7", True, -1])
def test_a_number_of_classes_that_is_none_is_refused(num_classes):
  with pytest.raises(UserError, match="num_classes: expected a whole number"):
    vc.load(MINI, num_classes=num_classes)


def test_weights_beyond_float32_are_refused(weights_of):
  path, _ = weights_of(lambda state: state | {"head.bias": np.full(10, 1e300)})
  with pytest.raises(UserError, match="expected finite floats, got others in head.bias"):
    vc.load(MINI, path)


def test_another_image_size_resamples_the_positions():
  model, params = vc.load(MINI, "bundled", image_size=36)
  assert params["pos_embed"].shape == (1, 145, 64)
  assert vc.apply(model, params, jnp.zeros((1, 36, 36, 3))).shape == (1, 10)
  with pytest.raises(UserError, match="multiple of the patch size"):
    vc.load(MINI, "bundled", image_size=31)


@pytest.mark.slow
def test_stages_return_what_they_write(tmp_path, optax_promotion):
  config = default_config()
  config.model.variant, config.model.weights, config.data.pad = MINI, "bundled", 1
  config.budget.fraction = 0.7
  config.search.steps, config.search.batch_size, config.search.choose_images = 2, 4, 8
  config.data.eval_examples, config.evaluate.batch_size = 20, 10
  plan = vc.run_stage("search", config, tmp_path)
  assert plan == vc.load_plan(tmp_path / "plan.json")
  assert plan.gmacs == pytest.approx(0.7 * vc.count_cost(vc.load(MINI)[0]).gmacs, rel=0.01)
  result = vc.run_stage("evaluate", config, tmp_path)
  assert [row["name"] for row in result["rows"]] == ["dense", "diffrate"]
  assert result == json.loads((tmp_path / "result.json").read_text())
  assert (tmp_path / "report.md").exists()


def test_a_stage_that_is_none_is_refused(tmp_path):
  with pytest.raises(UserError, match="stage: expected one of pretrain, .*, got 'train'"):
    vc.run_stage("train", default_config(), tmp_path)


def test_a_hub_id_names_its_architecture(on_the_hub):
  for hub_id in ("timm/vit_base_patch16_224.dino", "timm/vit_base_patch16_224.mine"):
    on_the_hub(hub_id)
  checkpoint = open_checkpoint("timm/vit_base_patch16_224.dino")
  assert checkpoint.architecture == "vit_base_patch16_224"
  with pytest.raises(UserError, match="expected weights that say what they are of, got none"):
    vc.load("timm/vit_base_patch16_224.mine")
