"""The functions on models: compress, preprocess, plans without a search, export."""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest

import vitcomp_jax as vc
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax import exporting
from vitcomp_jax.data.transforms import evaluation_image, normalize
from vitcomp_jax.exported import FORMAT, VERSION
from vitcomp_jax.methods import registry
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.build import build
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.plans import PlanLayer
from vitcomp_jax.weights import files

MINI = "vit_mini_patch3_30"


@pytest.fixture(scope="module")
def tiny():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(VARIANTS, TINY, tiny_spec())
    yield vc.load(TINY)


def _dense(variant):
  """Makes a model without parameters."""
  spec = vc.get_spec(variant)
  return build(spec, spec.dense_layers)


def _images(model, count=2):
  return jax.random.normal(jax.random.key(0), (count, *model.spec.image_size, 3))


def _widths(spec, tokens=None):
  index = LayerIndex(((0, 1, 2), (8, 9, 15)), tuple(range(0, 32, 3)))
  layers = [PlanLayer(index).apply_to(layer) for layer in spec.dense_layers]
  if tokens:
    layers[1] = dataclasses.replace(layers[1], reduce=PruneMerge(tokens, tokens))
  return vc.make_plan(spec, layers, {})


def test_compress_is_load_under_a_plan(tmp_path):
  dense, params = vc.load(MINI, "bundled")
  plan = vc.uniform(dense, macs=0.7)
  (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
  small, same = vc.compress(dense, params, tmp_path / "plan.json")
  loaded, weights = vc.load(MINI, "bundled", plan)
  assert small == loaded
  jax.tree.map(np.testing.assert_array_equal, same, weights)


def test_compress_cuts_widths_once(tiny):
  dense, params = tiny
  cut = _widths(dense.spec)
  small, small_params = vc.compress(dense, params, cut)
  masked = build(dense.spec, cut.masked_layers_for(dense.spec))
  images = _images(dense)
  expected = masked.apply({"params": params}, images)
  np.testing.assert_allclose(vc.apply(small, small_params, images), expected, atol=1e-5)

  both, both_params = vc.compress(small, small_params, _widths(dense.spec, tokens=12))
  assert both.layers[1].reduce.merge_keep == 12
  jax.tree.map(np.testing.assert_array_equal, both_params, small_params)
  with pytest.raises(vc.UserError, match="expected a plan that keeps what the slimmed"):
    vc.compress(small, small_params, vc.tome(dense, r=2))


def test_compress_refuses_what_does_not_fit(tiny):
  dense, params = tiny
  with pytest.raises(vc.UserError, match="plan: expected 3 layers"):
    vc.compress(dense, params, "diffrate/deit_tiny@0.8")
  with pytest.raises(vc.UserError, match="missing: blocks.0.select"):
    vc.compress(dense, params, vc.dynamicvit(dense, keep=0.7))


def test_preprocess_is_what_evaluation_does():
  rng = np.random.default_rng(0)
  model = _dense(MINI)
  model = build(dataclasses.replace(model.spec, pad=1, crop_pct=0.9), model.layers)
  arrays = [rng.integers(0, 256, size, np.uint8) for size in ((28, 28, 3), (40, 51, 3), (9, 8))]
  images = [*arrays[:2], PIL.Image.fromarray(arrays[2])]
  expected = np.stack([evaluation_image(array, model.spec.preprocess) for array in arrays])
  found = vc.preprocess(model, images)
  assert found.shape == (3, 30, 30, 3) and found.dtype == np.float32
  np.testing.assert_array_equal(found, normalize(expected, model.spec.preprocess))
  batch = np.stack(2 * [arrays[0]])
  np.testing.assert_array_equal(vc.preprocess(model, batch)[1], found[0])
  np.testing.assert_array_equal(vc.preprocess(model, jax.numpy.asarray(batch))[1], found[0])


@pytest.mark.parametrize(
  "images",
  [
    [],
    np.zeros((28, 28, 3), np.uint8),
    PIL.Image.new("RGB", (8, 8)),
    [np.zeros((28, 28, 3))],
    ["a.png"],
  ],
)
def test_what_is_no_list_of_images_is_refused(images, tiny):
  with pytest.raises(vc.UserError, match="expected"):
    vc.preprocess(tiny[0], images)


MAKERS = {
  "tome": vc.tome,
  "evit": vc.evit,
  "evit_nofuse": lambda model, **budget: vc.evit(model, fuse=False, **budget),
  "dynamicvit": vc.dynamicvit,
  "uniform": vc.uniform,
  "uniform_merge": lambda model, **budget: vc.uniform(model, merge=True, **budget),
  "linear": vc.linear,
  "linear_merge": lambda model, **budget: vc.linear(model, merge=True, **budget),
  "random": lambda model, **budget: vc.uniform(model, importance="random", **budget),
}


# Those that differ in one option from another.
_MORE = ("evit_nofuse", "linear", "linear_merge", "random")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow if n in _MORE else ()) for n in MAKERS]
)
def test_a_budget_gives_the_plan_of_the_method_s_schedule(name):
  model = _dense(MINI)
  dense = vc.count_cost(model).gmacs
  plan = MAKERS[name](model, macs=0.7)
  assert plan.layers_for(model.spec) == registry.within(name, model.spec, 0.7 * dense)
  assert plan.layers == MAKERS[name](model, gmacs=0.7 * dense).layers
  assert plan.gmacs == pytest.approx(0.7 * dense, rel=0.01)
  assert json.loads(json.dumps(plan.to_json())) == plan.to_json()


def test_a_method_s_own_strength():
  model = _dense(MINI)
  spec = model.spec
  layers = vc.methods.tome.layers(spec, 7)
  assert vc.tome(model, r=7).layers_for(spec) == layers
  assert vc.tome(model, r=7).made_by == {"method": "tome", "r": 7}
  rates = [1, 1, 0.5, 1, 0.5, 1, 0.5, 1]
  assert vc.evit(model, keep=0.5).layers == vc.evit(model, keep=rates).layers
  assert vc.evit(model, keep=0.5).layers_for(spec) == vc.methods.evit.layers(spec, rates)
  ratios = [0.5, 0.25, 0.125]
  assert vc.dynamicvit(model, keep=0.5).layers_for(spec) == vc.methods.dynamicvit.layers(
    spec, [2, 4, 6], ratios
  )


def test_random_plans_meet_the_budget_and_are_the_seed_s():
  model = _dense(MINI)
  plans = [vc.random(model, macs=0.6, seed=seed) for seed in (0, 0, 1)]
  assert plans[0] == plans[1] != plans[2]
  dense = vc.count_cost(model).gmacs
  assert all(plan.gmacs == pytest.approx(0.6 * dense, rel=0.01) for plan in plans)


@pytest.mark.parametrize(
  ("make", "why"),
  [
    (lambda m: vc.uniform(m), "expected one of macs and gmacs, got none"),
    (
      lambda m: vc.uniform(m, macs=0.5, gmacs=1),
      "expected one of macs and gmacs, got macs and gmacs",
    ),
    (lambda m: vc.uniform(m, macs=float("nan")), "macs: expected a number above 0, got nan"),
    (lambda m: vc.tome(m, r=-1), "r: expected a whole number from 0"),
    (lambda m: vc.tome(m, r=7.5), "r: expected a whole number from 0"),
    (lambda m: vc.tome(m, r="7"), "r: expected a whole number from 0"),
    (lambda m: vc.random(m, macs=0.5, seed=-1), "seed: expected a whole number from 0, got -1"),
    (lambda m: vc.uniform(m, macs=1.5), "macs: expected more than 0 and at most 1, .* got 1.5"),
    (lambda m: vc.random(m, gmacs=9.0), "gmacs: expected more than 0 and at most 0.0"),
    (lambda m: vc.tome(m, r=3, macs=0.5), "expected r alone, or macs or gmacs"),
    (lambda m: vc.evit(m, keep=1.5), "keep: expected a share above 0"),
    (lambda m: vc.evit(m, keep=[0.5, 0.5]), "keep: expected one share, or 3"),
    (lambda m: vc.tome(vc.compress(m, vc.load(TINY)[1], vc.tome(m, r=2))[0], r=1), "dense model"),
  ],
)
def test_a_strength_or_budget_that_is_none_is_refused(make, why, tiny):
  with pytest.raises(vc.UserError, match=why):
    make(tiny[0])


def test_a_file_is_exported_and_runs(tiny, tmp_path):
  dense, params = tiny
  small, small_params = vc.compress(dense, params, vc.tome(dense, r=4))
  vc.export(small, small_params, tmp_path / "new" / "small.stablehlo")
  images = np.asarray(_images(small, 3))
  loaded = vc.load_exported(tmp_path / "new" / "small.stablehlo")
  expected = np.asarray(vc.apply(small, small_params, images))
  np.testing.assert_allclose(loaded(images), expected, atol=1e-4 * np.abs(expected).max())
  assert loaded.preprocess == small.spec.preprocess
  assert loaded.manifest["plan"] == vc.tome(dense, r=4).to_json() | {"made_by": {}}


@pytest.mark.parametrize("artefacts", [5, [5], [{}], [{"file": "a", "format": "stablehlo"}]])
def test_a_damaged_manifest_is_refused(artefacts, tmp_path):
  about = {"format": FORMAT, "version": VERSION, "input": {}, "output": {}, "class_names": None}
  (tmp_path / "manifest.json").write_text(json.dumps(about | {"artefacts": artefacts}))
  with pytest.raises(vc.UserError, match="expected artefacts with file, format and sha256"):
    vc.load_exported(tmp_path)


def test_a_file_for_timm_is_loaded_again(tiny, tmp_path):
  dense, params = tiny
  vc.export(dense, params, tmp_path / "w.safetensors")
  _, again = vc.load(TINY, tmp_path / "w.safetensors")
  jax.tree.map(np.testing.assert_array_equal, again, params)
  small, small_params = vc.compress(dense, params, _widths(dense.spec))
  vc.export(small, small_params, tmp_path / "small.safetensors")
  kernel = files.read(str(tmp_path / "small.safetensors"))["blocks.0.attn.qkv.weight"]
  assert kernel.shape == (18, 16)
  how = json.loads((tmp_path / "small.safetensors.json").read_text())["artefacts"][0]["model"]
  assert how.startswith("small.safetensors is for timm's model with num_heads=2")


def test_what_cannot_be_exported_is_refused(tiny, tmp_path, monkeypatch):
  dense, params = tiny
  small, small_params = vc.compress(dense, params, vc.tome(dense, r=4))
  for name in ("small", "small.tflite"):
    with pytest.raises(vc.UserError, match="ends in one of .stablehlo .*, .onnx .*, .safetensors"):
      vc.export(small, small_params, tmp_path / name)
  with pytest.raises(vc.UserError, match="timm: .* does not remove tokens; choose another form"):
    vc.export(small, small_params, tmp_path / "small.safetensors")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(vc.UserError, match="onnx needs jax2onnx and onnxruntime"):
    vc.export(small, small_params, tmp_path / "small.onnx")
  monkeypatch.undo()

  write = exporting.WRITERS["timm"]
  other = params | {"head": {**params["head"], "bias": params["head"]["bias"] + 1}}
  monkeypatch.setitem(
    exporting.WRITERS,
    "timm",
    lambda program, path: write(dataclasses.replace(program, params=other), path),
  )
  with pytest.raises(RuntimeError, match="8 of 8 outputs differ"):
    vc.export(dense, params, tmp_path / "w.safetensors")
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what jax2onnx imports
def test_onnx_runtime_runs_an_exported_file(tiny, tmp_path):
  dense, params = tiny
  small, small_params = vc.compress(dense, params, vc.tome(dense, r=4))
  vc.export(small, small_params, tmp_path / "small.onnx")
  images = np.asarray(_images(small, 3))
  expected = np.asarray(vc.apply(small, small_params, images))
  loaded = vc.load_exported(tmp_path / "small.onnx")
  np.testing.assert_allclose(loaded(images), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda x: (x * 255).astype(np.uint8), "expected floats, as preprocess makes them, got uint8"),
    (lambda x: x[:, :-1], r"expected floats of shape \[b, .*, 3\], got"),
    (lambda x: x[0], "expected floats of shape"),
    (list, "expected floats of shape .* got list"),
  ],
)
def test_other_images_are_not_applied_to(change, said, tiny):
  model, params = tiny
  images = np.asarray(_images(model, 2))
  with pytest.raises(vc.UserError, match=said):
    vc.apply(model, params, change(images))


def test_parameters_of_another_model_are_refused(tiny, tmp_path):
  model, params = tiny
  images = np.asarray(_images(model, 2))
  for call in (
    lambda: vc.apply(model, {}, images),
    lambda: vc.search(model, {}, images, macs=0.7),
    lambda: vc.export(model, {}, tmp_path / "x.stablehlo"),
  ):
    with pytest.raises(vc.UserError, match="weights do not fit|expected"):
      call()
