"""What `save` writes, `load` reads back, bit for bit; and checkpoints that say what they are."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax import saved
from vitcomp_jax.models.build import build
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.plans import PlanLayer, save_plan
from vitcomp_jax.weights import files, loading

MINI = "vit_mini_patch3_30"
INDEX = LayerIndex(((0, 1, 2), (8, 9, -1)), tuple(range(0, 32, 3)))


@pytest.fixture(scope="module", autouse=True)
def tiny():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(VARIANTS, TINY, tiny_spec())
    yield


@functools.cache
def _loaded():
  return vc.load(TINY)


def _tiny():
  model, params = _loaded()
  return model, dict(params)


def _slimmed(spec):
  """A plan of fewer widths, and of fewer tokens behind the first layer."""
  layers = [PlanLayer(INDEX).apply_to(layer) for layer in spec.dense_layers]
  layers[0] = dataclasses.replace(layers[0], reduce=vc.methods.tome.BipartiteMerge(3))
  return vc.make_plan(spec, layers, {})


def _images(model):
  return jax.random.normal(jax.random.key(1), (2, *model.spec.image_size, 3))


def _dtypes(params):
  return jax.tree.map(lambda p: str(p.dtype), params)


def _assert_same(folder, model, params):
  again, weights = vc.load(folder)
  assert again == model and again.spec.class_names == model.spec.class_names
  jax.tree.map(np.testing.assert_array_equal, weights, dict(params))
  assert _dtypes(weights) == _dtypes(dict(params))
  images = _images(model)
  np.testing.assert_array_equal(vc.apply(again, weights, images), vc.apply(model, params, images))


@pytest.mark.parametrize(
  ("plan", "size"),
  [
    ("dense", (36, 24)),
    ("tokens", 30),
    ("widths", 30),
    pytest.param("dense", 30, marks=pytest.mark.slow),
    pytest.param("tokens", (36, 24), marks=pytest.mark.slow),
    pytest.param("widths", (36, 24), marks=pytest.mark.slow),
  ],
)
def test_a_folder_holds_the_model(plan, size, tmp_path):
  model, params = vc.load(TINY, num_classes=7, image_size=size)
  if plan != "dense":
    made = vc.tome(model, r=4) if plan == "tokens" else _slimmed(model.spec)
    model, params = vc.compress(model, params, made)
  vc.save(tmp_path / "model", model, params)
  _assert_same(tmp_path / "model", model, params)
  there = {path.name for path in (tmp_path / "model").iterdir()}
  assert there == {"model.safetensors", "spec.json"} | ({"plan.json"} if plan != "dense" else set())
  if plan == "widths":
    found = vc.load_plan(tmp_path / "model" / "plan.json")
    assert found.indices == (INDEX,) * model.spec.depth


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_of_weights_and_computation_are_kept(dtype, tmp_path):
  model, params = _tiny()
  half = dataclasses.replace(model.spec, dtype=jnp.dtype(dtype).name, antialias=False)
  model = build(half, half.dense_layers)
  params["head"] = jax.tree.map(lambda p: p.astype(dtype), params["head"])
  vc.save(tmp_path / "model", model, params)
  _assert_same(tmp_path / "model", model, params)


def test_features_names_and_preprocessing_are_kept(tmp_path):
  model, params = vc.load(MINI, "bundled")
  spec = dataclasses.replace(
    model.spec, class_names=tuple("abcdefghij"), pad=1, mean=(0.1, 0.2, 0.3)
  )
  vc.save(tmp_path / "model", build(spec, spec.dense_layers), params)
  _assert_same(tmp_path / "model", build(spec, spec.dense_layers), params)
  assert vc.load(tmp_path / "model")[0].spec.pad == 1
  model, params = vc.load(MINI, "bundled", num_classes=0)
  vc.save(tmp_path / "model", model, params)  # over the other
  _assert_same(tmp_path / "model", model, params)


def test_a_folder_takes_other_classes_sizes_and_plans(tmp_path):
  model, params = _tiny()
  vc.save(tmp_path / "model", model, params)
  other, _ = vc.load(str(tmp_path / "model"), num_classes=3, image_size=36)
  assert (other.spec.num_classes, other.spec.image_size) == (3, (36, 36))
  plan = vc.tome(model, r=2)
  assert vc.load(tmp_path / "model", plan=plan)[0] == vc.compress(model, params, plan)[0]
  vc.save(tmp_path / "small", *vc.compress(model, params, plan))
  with pytest.raises(vc.UserError, match="expected 37 tokens"):
    vc.load(tmp_path / "small", image_size=36)


def test_a_search_is_not_saved(tmp_path):
  model, params = _tiny()
  gate = lambda x: x  # noqa: E731
  layers = tuple(dataclasses.replace(l, token_gate=gate) for l in model.layers)
  with pytest.raises(vc.UserError, match="expected a deployed model"):
    vc.save(tmp_path / "model", build(model.spec, layers), params)
  with pytest.raises(vc.UserError, match="1 missing: pos_embed"):
    vc.save(tmp_path / "model", model, {k: v for k, v in params.items() if k != "pos_embed"})
  assert not list(tmp_path.iterdir())


def test_another_spec_than_the_variants_is_saved(tmp_path):
  model, params = _tiny()
  odd = dataclasses.replace(model.spec, norm_eps=1e-3, activation="gelu_tanh")
  odd_model = build(odd, odd.dense_layers)
  vc.save(tmp_path / "model", odd_model, params)
  assert vc.load(tmp_path / "model")[0] == odd_model
  plan = vc.tome(odd_model, r=2)
  vc.save(tmp_path / "small", *vc.compress(odd_model, params, plan))
  small, _ = vc.load(tmp_path / "small")
  assert small.spec == odd and small.layers == plan.layers_for(odd)


def test_fields_that_are_given_count_more_than_a_folders(tmp_path):
  vc.save(tmp_path / "model", *_tiny())
  assert vc.load(tmp_path / "model", activation="quick_gelu")[0].spec.activation == "quick_gelu"
  assert vc.load(tmp_path / "model", antialias=False)[0].spec.antialias is False


def test_nothing_else_is_replaced(tmp_path):
  model, params = _tiny()
  (tmp_path / "file").write_text("mine")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "notes.txt").write_text("mine")
  vc.save(tmp_path / "model", model, params)
  (tmp_path / "model" / "notes.txt").write_text("mine")
  for name in ("file", "folder", "model"):
    with pytest.raises(
      vc.UserError, match="expected a new folder, or one with a saved model alone"
    ):
      vc.save(tmp_path / name, model, params)
  assert (tmp_path / "file").read_text() == "mine"
  (tmp_path / "empty").mkdir()
  vc.save(tmp_path / "empty", model, params)
  _assert_same(tmp_path / "empty", model, params)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  model, params = _tiny()
  vc.save(tmp_path / "model", model, params)
  other = params | {"pos_embed": params["pos_embed"] + 1}

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(saved, "write_json", full)
  with pytest.raises(vc.UserError, match="cannot be written .No space left on device"):
    vc.save(tmp_path / "model", model, other)
  monkeypatch.undo()
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  _assert_same(tmp_path / "model", model, params)
  rename = pathlib.Path.rename

  def once(path, target):
    if path.name == "new":
      full()
    return rename(path, target)

  monkeypatch.setattr(pathlib.Path, "rename", once)
  with pytest.raises(vc.UserError, match="cannot be written"):
    vc.save(tmp_path / "model", model, other)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  _assert_same(tmp_path / "model", model, params)


@pytest.mark.parametrize(
  "changes",
  [
    {"format": "other"},
    {"version": 2},
    {"dtype": "float7"},
    {"dtype": "int32"},
    {"attention": "foo"},
    {"antialias": 1},
    None,
  ],
)
def test_a_damaged_spec_is_refused(changes, tmp_path):
  model, params = _tiny()
  vc.save(tmp_path, model, params)
  path = tmp_path / "spec.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes) if changes else "{")
  with pytest.raises(vc.UserError, match="spec.json: expected what `save` writes"):
    vc.load(tmp_path)


@pytest.mark.parametrize("is_compressed", [True, False])
def test_a_plan_that_came_or_went_is_refused(is_compressed, tmp_path):
  dense, params = _tiny()
  plan = vc.tome(dense, r=2)
  model = vc.compress(dense, params, plan)[0] if is_compressed else dense
  vc.save(tmp_path, model, params)
  if is_compressed:
    (tmp_path / "plan.json").unlink()
  else:
    save_plan(plan, tmp_path / "plan.json")
  with pytest.raises(vc.UserError, match="as its spec.json says; save the model again"):
    vc.load(tmp_path)


def test_a_file_that_names_its_architecture_is_a_source(tmp_path):
  model, params = vc.load(MINI, "bundled")
  path = tmp_path / "weights.safetensors"
  loading.save_params(model.spec, params, path)
  again, weights = vc.load(path)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, weights, params)
  files.write(params, str(path))
  with pytest.raises(vc.UserError, match="name the architecture"):
    vc.load(path)


def test_a_source_that_is_none_is_refused(tmp_path):
  with pytest.raises(vc.UserError, match="'vit_mini' is not known; near it are vit_mini_patch3_30"):
    vc.load("vit_mini")
  with pytest.raises(vc.UserError, match="are not there"):
    vc.load(tmp_path / "none.safetensors")
  with pytest.raises(vc.UserError, match="a directory without weights"):
    vc.load(tmp_path)
  vc.save(tmp_path / "model", *_tiny())
  with pytest.raises(vc.UserError, match="weights: expected none beside the checkpoint"):
    vc.load(tmp_path / "model", weights="bundled")
