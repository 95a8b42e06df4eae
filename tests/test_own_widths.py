"""Layers with widths of their own: no slices of the dense ones, so their weights come with them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import forward, random_images, random_params, small_spec
from tests.test_families import FAMILIES, quickly
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax.methods import DiffRate
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.dynamicvit import PredictorSelect
from vitcomp_jax.models.build import build
from vitcomp_jax.models.importance import IMPORTANCES
from vitcomp_jax.models.layer_spec import LayerSpec, Widths
from vitcomp_jax.models.slicing import LayerIndex
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.plans import PlanLayer, make_plan, parse_plan, plan_of, save_plan
from vitcomp_jax.reporting.findings import plan_blocks
from vitcomp_jax.weights import files, loading, writing_back

# Dimensions of queries and keys, and of values, of each head; and hidden units.
CUTS = [(4, 6, 20), (6, 2, 32), (2, 2, 11)]
# Norms inside of attention or the MLP see how many channels there are.
NORMED = ("eva02", "qk_norm_after")


def _cut(spec, cuts=CUTS):
  """Layers of other widths; of rotated channels the last pairs, in falling order."""
  layers = []
  for dense, (qk, value, hidden) in zip(spec.dense_layers, cuts, strict=True):
    rotated = None
    if dense.pairing is not None:
      pairs = dense.head_dim // 2
      ends = [(i + 1) * pairs - 1 for i in range(dense.num_heads)]
      rotated = tuple(tuple(range(end, end - qk // 2, -1)) for end in ends)
    changes = dict(head_dim=qk, value_dim=value, mlp_dim=hidden, rotated=rotated)
    layers.append(dataclasses.replace(dense, **changes))
  return tuple(layers)


def _in_dense(spec, layers, params):
  """The same network in the dense architecture: what was cut is zero there."""
  params = dict(params)
  for i, (dense, layer) in enumerate(zip(spec.dense_layers, layers, strict=True)):
    dims, inner = dense.head_dim, dense.widths.qk
    starts = dims * np.arange(dense.num_heads)[:, None]
    qk = np.arange(layer.head_dim) + starts
    if layer.rotated is not None:
      pairs = np.array(layer.rotated) % (dims // 2)
      both = [pairs, pairs + dims // 2] if layer.pairing == "halves" else [2 * pairs, 2 * pairs + 1]
      axis = 1 if layer.pairing == "halves" else 2
      qk = (np.stack(both, axis) + starts[..., None]).reshape(qk.shape)
    v = (np.arange(layer.widths.value // dense.num_heads) + starts).ravel()
    units = np.concatenate([qk.ravel(), qk.ravel() + inner, v + 2 * inner])
    attn, mlp = dict(params[f"blocks_{i}"]["attn"]), dict(params[f"blocks_{i}"]["mlp"])
    attn["qkv"] = {name: _spread(x, units, 3 * inner) for name, x in attn["qkv"].items()}
    attn["proj"] = attn["proj"] | {"kernel": _spread(attn["proj"]["kernel"].T, v, inner).T}
    for name, index in (("q_bias", qk.ravel()), ("v_bias", v)):
      if name in attn:
        attn[name] = _spread(attn[name], index, inner)
    hidden = np.arange(layer.mlp_dim)
    mlp["fc2"] = mlp["fc2"] | {"kernel": _spread(mlp["fc2"]["kernel"].T, hidden, dense.mlp_dim).T}
    for name in {"fc1", "fc1_g", "fc1_x"} & mlp.keys():
      for leaf, x in mlp[name].items():
        parts = np.split(x, x.shape[-1] // layer.mlp_dim, axis=-1)  # gates and values may be one
        wide = [_spread(part, hidden, dense.mlp_dim) for part in parts]
        mlp[name] = mlp[name] | {leaf: np.concatenate(wide, axis=-1)}
    params[f"blocks_{i}"] = params[f"blocks_{i}"] | {"attn": attn, "mlp": mlp}
  return jax.tree.map(jnp.asarray, params)


def _spread(values, index, width):
  spread = np.zeros((*values.shape[:-1], width), values.dtype)
  spread[..., index] = values
  return spread


@functools.cache
def _family(name):
  spec = small_spec(depth=3, **FAMILIES[name])
  layers = _cut(spec)
  return spec, layers, random_params(spec, layers=layers)


@functools.cache
def _tiny():
  """A tiny model that is cut, and its weights."""
  spec = dataclasses.replace(tiny_spec(), num_classes=10)
  layers = _cut(spec)
  return spec, layers, random_params(spec, layers=layers)


@pytest.fixture(autouse=True)
def _variant(monkeypatch):
  monkeypatch.setitem(VARIANTS, TINY, tiny_spec())


def _images(spec):
  return np.asarray(random_images(spec, 2))


def test_equal_widths_are_equal_layers():
  layer = LayerSpec(2, 8, 32, 0.3, value_dim=8)
  assert layer == LayerSpec(2, 8, 32, 0.3) and hash(layer) == hash(LayerSpec(2, 8, 32, 0.3))
  narrow = dataclasses.replace(layer, head_dim=5, value_dim=8)
  assert layer.widths == (16, 16, 32) and narrow.widths == Widths(qk=10, value=16, hidden=32)
  assert dataclasses.replace(narrow, head_dim=8) == layer


@pytest.mark.parametrize("name", quickly("dinov3", "aimv2"))
def test_a_cut_layer_is_the_dense_one_with_zeros(name):
  spec, layers, params = _family(name)
  images = random_images(spec, 2)
  small = forward(spec, layers, {"params": params}, images)
  assert bool(jnp.isfinite(small.logits).all())
  written = json.loads(json.dumps(make_plan(spec, layers, {}).to_json()))
  assert parse_plan(written).layers_for(spec) == layers
  if name not in NORMED:
    same = _in_dense(spec, layers, params)
    dense = forward(spec, spec.dense_layers, {"params": same}, images)
    np.testing.assert_allclose(small.logits, dense.logits, rtol=0, atol=1e-5)


QUICK = ("cls", "value_norm")


@pytest.mark.parametrize(
  "importance",
  [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in IMPORTANCES if n not in QUICK)],
)
def test_tokens_are_removed_as_from_the_dense_one_with_zeros(importance):
  spec, layers, params = _tiny()
  if importance == "pool_query":
    spec = dataclasses.replace(spec, pool="map", num_classes=0)
    params = random_params(spec, layers=layers)
  images, reduce = random_images(spec, 2), PruneMerge(20, 14, importance=importance)
  small, dense = (
    (dataclasses.replace(each[0], reduce=reduce), *each[1:]) for each in (layers, spec.dense_layers)
  )
  found = forward(spec, small, {"params": params}, images)
  right = forward(spec, dense, {"params": _in_dense(spec, layers, params)}, images)
  assert found.tokens.x.shape[1] == 14
  np.testing.assert_allclose(found.logits, right.logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_search_on_cut_layers_equals_its_plan():
  spec, layers, params = _tiny()
  counts = [(22, 18), (16, 12), (12, 9)]
  reduced = tuple(
    dataclasses.replace(layer, reduce=PruneMerge(*count))
    for layer, count in zip(layers, counts, strict=True)
  )
  options = vc.config.DiffRateOptions(compress_first=True, compress_last=True)
  method = DiffRate(spec, 1.0, options, layers)
  arch, images = method.replayed_arch(reduced), random_images(spec, 2)
  masked = forward(spec, method.replayed_layers(), {"params": params, "arch": arch}, images)
  static = forward(spec, reduced, {"params": params}, images)
  np.testing.assert_allclose(masked.logits, static.logits, rtol=0, atol=1e-5)


def test_a_prediction_module_works_on_cut_layers():
  spec, layers, _ = _tiny()
  layers = (layers[0], dataclasses.replace(layers[1], select=PredictorSelect(9)), layers[2])
  params = random_params(spec, layers=layers)
  found = forward(spec, layers, {"params": params}, random_images(spec, 2))
  assert found.tokens.x.shape[1] == 9 and bool(jnp.isfinite(found.logits).all())


def test_a_plan_says_the_widths_alone():
  spec, layers, _ = _tiny()
  plan = make_plan(spec, layers, {"method": "mine"})
  first, second, last = plan.to_json()["layers"]
  nothing = {"select": {"type": "keep_all"}, "reduce": {"type": "keep_all"}}
  assert first == {"num_heads": 2, "head_dim": 4, "value_dim": 6, "mlp_dim": 20} | nothing
  assert second == {"num_heads": 2, "head_dim": 6, "value_dim": 2, "mlp_dim": 32} | nothing
  assert last == {"num_heads": 2, "head_dim": 2, "mlp_dim": 11} | nothing
  assert plan.has_own_widths and plan.indices is None
  again = parse_plan(json.loads(json.dumps(plan.to_json())))
  assert again.layers == plan.layers and again.layers_for(spec) == layers
  assert again.layers[0].apply_to(spec.dense_layers[0]).qk_scale == 8**-0.5
  assert plan_of(build(spec, layers)).layers == plan.layers
  (table,) = plan_blocks(plan, (), None)
  assert table.heads[1:] == ["query dimensions", "value dimensions", "hidden units"]
  assert [row[1:] for row in table.lines] == [
    ("8", "12", "20"),
    ("12", "4", "32"),
    ("4", "4", "11"),
  ]


def test_a_layer_that_is_whole_has_no_widths_of_its_own():
  spec, layers, _ = _tiny()
  plan = make_plan(spec, (spec.dense_layers[0], *layers[1:]), {})
  assert plan.layers[0] == PlanLayer() and plan.has_own_widths
  assert not make_plan(spec, spec.dense_layers, {}).has_own_widths


def test_units_of_a_plan_of_widths_are_not_masked():
  spec, layers, _ = _tiny()
  with pytest.raises(vc.UserError, match="expected indices of units to mask in the dense model"):
    make_plan(spec, layers, {}).masked_layers_for(spec)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(widths=Widths(18, 4, 8)), "layer 1: expected head_dim from 1 to 8, got 9"),
    (dict(widths=Widths(4, 5, 8)), "layer 1: expected value_dim from 1 to 8, got 2.5"),
    (dict(widths=Widths(4, 4, 0)), "layer 1: expected mlp_dim from 1 to 32, got 0"),
    (dict(rotated=((0,), (4,))), "layer 1: expected rotated to hold nothing"),
    (
      dict(widths=Widths(4, 4, 8), index=LayerIndex(((0,), (8,)), (0,))),
      "layer 1: expected indices, or widths of their own, got both",
    ),
  ],
)
def test_widths_that_no_layer_is_cut_to(changes, message):
  spec, layers, _ = _tiny()
  plan = make_plan(spec, layers, {})
  wrong = (plan.layers[0], dataclasses.replace(plan.layers[1], **changes), plan.layers[2])
  with pytest.raises(vc.UserError, match=message):
    dataclasses.replace(plan, layers=wrong).layers_for(spec)


def test_fewer_heads_need_indices():
  spec, layers, _ = _tiny()
  one = dataclasses.replace(layers[1], num_heads=1)
  with pytest.raises(vc.UserError, match="layer 1: expected 2 heads, got 1 without the indices"):
    make_plan(spec, (layers[0], one, layers[2]), {})


@pytest.mark.parametrize(
  "rotated",
  [
    None,
    [[0, 1]],
    [[0], [8]],
    [[0, 0], [8, 9]],
    [[0, 8], [1, 9]],
    [[0, 1], [8, 16]],
    [[0, 1], [7, 8]],
  ],
)
def test_pairs_that_no_head_has(rotated):
  spec, layers, _ = _family("dinov3")
  values = json.loads(json.dumps(make_plan(spec, layers, {}).to_json()))
  first = values["layers"][0]
  assert first["rotated"] == [[7, 6], [15, 14]]
  values["layers"][0] = {k: v for k, v in first.items() if k != "rotated"}
  if rotated is not None:
    values["layers"][0]["rotated"] = rotated
  with pytest.raises(vc.UserError, match="layer 0: expected rotated to hold half of its head_dim"):
    parse_plan(values)


def test_compress_takes_the_plans_weights():
  spec, layers, params = _tiny()
  dense, dense_params = build(spec, spec.dense_layers), random_params(spec)
  plan = make_plan(spec, layers, {}, params=params)
  small, weights = vc.compress(dense, dense_params, plan)
  assert small == build(spec, layers) and weights is not params
  jax.tree.map(np.testing.assert_array_equal, weights, params)
  # Plans are equal and hash equal, whatever their weights.
  bare = dataclasses.replace(plan, params=None)
  assert plan == bare and hash(bare.layers) == hash(plan.layers)
  with pytest.raises(vc.UserError, match=r"read without them; load both by vc.load\(weights, plan"):
    vc.compress(dense, dense_params, bare)

  # What is slimmed already keeps its weights, which may be tuned since.
  fewer = (dataclasses.replace(layers[0], reduce=PruneMerge(20, 14)), *layers[1:])
  tuned = jax.tree.map(lambda x: x + 1, params)
  for made in (make_plan(spec, fewer, {}), make_plan(spec, fewer, {}, params=params)):
    both, weights = vc.compress(small, tuned, made)
    assert both.layers[0].reduce.merge_keep == 14
    jax.tree.map(np.testing.assert_array_equal, weights, tuned)
  with pytest.raises(vc.UserError, match="expected a plan that keeps what the slimmed"):
    vc.compress(small, params, vc.tome(dense, r=2))
  # A plan that cuts nothing may bring weights too.
  tokens = dataclasses.replace(vc.tome(dense, r=2), params=jax.tree.map(lambda x: -x, dense_params))
  _, weights = vc.compress(dense, dense_params, tokens)
  jax.tree.map(np.testing.assert_array_equal, weights, tokens.params)


def test_a_folder_and_a_file_hold_the_model(tmp_path):
  spec, layers, params = _tiny()
  model = build(spec, layers)
  vc.save(tmp_path / "model", model, params)
  weights = tmp_path / "model" / "model.safetensors"
  assert files.read(str(weights))["blocks.0.attn.qkv.weight"].shape == (28, 16)
  expected = vc.apply(model, params, _images(spec))
  save_plan(make_plan(spec, layers, {}), tmp_path / "plan.json")
  for again, same in (
    vc.load(tmp_path / "model"),
    vc.load(weights, plan=tmp_path / "plan.json"),
    vc.load(TINY, weights, tmp_path / "plan.json"),
    (model, loading.load_params(spec, layers, str(weights))),
  ):
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    np.testing.assert_array_equal(vc.apply(again, same, _images(spec)), expected)
  with pytest.raises(vc.UserError, match="blocks.0.attn.qkv.weight"):
    vc.load(weights)
  loading.save_params(spec, random_params(spec), tmp_path / "dense.safetensors")
  with pytest.raises(vc.UserError, match="blocks.0.attn.qkv.weight"):
    vc.load(tmp_path / "dense.safetensors", plan=tmp_path / "plan.json")


@pytest.mark.parametrize("form", ["stablehlo", pytest.param("onnx", marks=[pytest.mark.slow])])
@pytest.mark.filterwarnings("default")  # of what jax2onnx imports
def test_an_export_equals_the_model(form, tmp_path):
  spec, layers, params = _tiny()
  path = tmp_path / f"model.{form}"
  vc.export(build(spec, layers), params, path)
  expected = np.asarray(vc.apply(build(spec, layers), params, _images(spec)))
  found = vc.load_exported(path)(_images(spec))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_timm_holds_even_widths_alone(tmp_path):
  spec, layers, params = _tiny()
  with pytest.raises(vc.UserError, match="same widths in all layers, and in queries, keys and"):
    vc.export(build(spec, layers), params, tmp_path / "model.safetensors")
  even = _cut(spec, [(5, 5, 20)] * 3)
  vc.export(  # which compares both
    build(spec, even), random_params(spec, layers=even), tmp_path / "model.safetensors"
  )
  written = files.read(str(tmp_path / "model.safetensors"))
  assert written["blocks.0.attn.qkv.weight"].shape == (30, 16)


@pytest.mark.parametrize(
  ("fields", "cuts", "message"),
  [
    ({}, CUTS, "heads that share the width 32 for ViTForImageClassification, got slimmed ones"),
    (
      FAMILIES["dinov3"] | {"num_classes": 0},
      [(16, 16, 64)] * 3,
      "expected rotated channels in their order, got sorted ones",
    ),
  ],
)
def test_transformers_holds_no_such_widths(fields, cuts, message, tmp_path):
  kind = "dinov3_vit" if fields else "vit"
  spec = small_spec(depth=3, huggingface=json.dumps({"model_type": kind}), **fields)
  layers = _cut(spec, cuts)
  with pytest.raises(vc.UserError, match=message):
    writing_back.save_huggingface(spec, layers, random_params(spec, layers=layers), tmp_path / "hf")
