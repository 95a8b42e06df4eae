"""Budgets by time: the table between its counts, its gradient, its file; searches that meet it."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small_spec
from vitcomp_jax.config import DiffRateOptions
from vitcomp_jax.cost import latency, macs, timing
from vitcomp_jax.cost.cost_models import MACS, Latency, never_falling, parse_latency
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.diffrate.counts import candidates, expected_count, kept_count
from vitcomp_jax.methods.diffrate.reducer import reduction
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.vit import ViT

SPEC = small_spec(image_size=(56, 56), depth=12)
TABLE = Latency(
  (2, 10, 60, 197), (1.0, 2.0, 9.0, 40.0), (0.5, 0.6, 2.0, 3.0), (1.0, 3.0, 12.0, 42.0), 5.0
)


def _plain(n, column):
  """Linear between the counts around it, by hand."""
  for i in range(len(TABLE.counts) - 1):
    low, high = TABLE.counts[i : i + 2]
    if low <= n <= high:
      return column[i] + (column[i + 1] - column[i]) * (n - low) / (high - low)
  raise AssertionError(n)


def test_a_table_is_linear_between_its_counts():
  counts = [(197, 150), (150, 150), (150, 11), (11, 2)]
  expected = TABLE.fixed_ms
  for at_attention, at_mlp in counts:
    expected += _plain(at_attention, TABLE.attention_ms) + _plain(at_mlp, TABLE.mlp_ms)
    if at_mlp < at_attention:
      expected += _plain(at_attention, TABLE.reduction_ms)
  assert TABLE.count(SPEC, (), counts) == pytest.approx(expected, rel=1e-6)
  traced = [tuple(jnp.float32(n) for n in pair) for pair in counts]
  found = jax.jit(lambda c: TABLE.count(SPEC, (), c))(traced)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_table_knows_no_widths():
  counts, widths = [(197, 150)], [SPEC.dense_layers[0].widths]
  with pytest.raises(UserError, match="latency: expected a search of tokens, got one of widths"):
    TABLE.count(SPEC, (), counts, widths)


def test_gradients_pass_the_rounded_counts():
  options = candidates(196, 1)
  logits = jax.random.normal(jax.random.key(0), options.shape)

  def spent(logits):
    kept = kept_count(expected_count(logits, options), 196) + 1
    return TABLE.count(SPEC, (), [(jnp.float32(197), kept), (kept, kept)])

  kept = int(kept_count(expected_count(logits, options), 196)) + 1
  assert 60 < kept < 197
  # The MLPs of both layers and the attention of the second one see the count.
  slope = (2 * (42 - 12) + (40 - 9)) / (197 - 60)
  expected = slope * jax.grad(lambda logits: expected_count(logits, options))(logits)
  np.testing.assert_allclose(jax.grad(spent)(logits), expected, rtol=1e-4, atol=1e-6)


def test_noise_is_evened_out_and_what_rises_stays():
  rising = np.array([0.0, 1.0, 1.0, 4.0])
  np.testing.assert_array_equal(never_falling(rising), rising)
  assert never_falling(np.array([1.0, 3.0, 2.0, 5.0])).tolist() == [1.0, 2.5, 2.5, 5.0]
  noisy = never_falling(np.random.default_rng(0).normal(size=50))
  assert np.all(np.diff(noisy) >= 0) and noisy[0] >= 0


def _learnt(method):
  """Rates that a search may have come to."""
  rng = np.random.default_rng(0)
  if method.options.recipe == "paper":
    return jax.tree.map(lambda a: 3 * rng.standard_normal(a.shape), method.init())
  return jax.tree.map(lambda a: rng.uniform(0.3, 1), method.rates.init())


@pytest.mark.parametrize(
  "share", [0.6, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.35, 0.9))]
)
def test_start_and_plan_meet_a_latency(share):
  dense = TABLE.static(SPEC, SPEC.dense_layers)
  method = DiffRate(SPEC, share * dense, cost=TABLE)
  method.check()
  arch = jax.device_get(method.init())
  assert (
    0.95 * share * dense
    <= TABLE.static(SPEC, method.static_layers(method.expected_counts(arch)))
    <= share * dense
  )
  assert TABLE.static(SPEC, method.deploy(_learnt(method))) == pytest.approx(
    share * dense, rel=0.01
  )


@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_a_search_goes_on_from_another_budget(recipe):
  dense = MACS.static(SPEC, SPEC.dense_layers)
  method = DiffRate(SPEC, 0.5 * dense, DiffRateOptions(recipe=recipe))
  learnt = _learnt(method)
  arch = jax.device_get(method.init(learnt))
  found = method.expected_counts(arch)
  assert 0.47 * dense <= MACS.static(SPEC, method.static_layers(found)) <= 0.5 * dense
  if recipe == "ours":
    offsets = (found - method.expected_counts(learnt))[method.rates.learns]
    inside = (found > 1) & (found < SPEC.num_patches)
    moved = offsets[inside[method.rates.learns]]
    np.testing.assert_allclose(moved, moved[0], atol=1e-3)
    return
  moved = jax.tree.map(np.subtract, arch, learnt)
  slope = moved["blocks_1"]["reduce"]["merge_logits"][0]  # at all patches
  for i, options in enumerate(method.rates._candidates):
    for name, counts in options.items():
      expected = slope * counts / SPEC.num_patches
      np.testing.assert_allclose(moved[f"blocks_{i}"]["reduce"][name], expected, atol=1e-3)


def test_a_table_and_its_file(tmp_path):
  table = dataclasses.replace(TABLE, about={"device": "this one", "batch": 4})
  path = tmp_path / "latency.json"
  path.write_text(json.dumps(table.to_json()))
  assert latency.read(path, "jax") == table and table.runtime == "jax"


@pytest.mark.parametrize(("asked", "there"), [("onnxruntime", "jax"), ("jax", "onnxruntime")])
def test_a_table_of_one_runtime_is_never_used_for_another(asked, there, tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(latency, "programs", lambda *given: ran.append(given[-1]) or {})
  monkeypatch.setattr(latency, "tabulate", lambda *_: TABLE)
  for runtime in (there, asked, there, asked):
    table = latency.table(SPEC, 2, PruneMerge, tmp_path, runtime)
    assert table.runtime == table.about["runtime"] == runtime
  assert ran == [there, asked]  # then they are in the cache
  first, second = sorted(tmp_path.iterdir(), key=lambda path: asked in path.name)
  assert latency.read(first, there).runtime == there
  with pytest.raises(UserError, match=f"expected a table of {asked}, got one of {there}; remove"):
    latency.read(first, asked)
  second.write_bytes(first.read_bytes())
  with pytest.raises(UserError, match=f"expected a table of {asked}, got one of {there}"):
    latency.table(SPEC, 2, PruneMerge, tmp_path, asked)


@pytest.mark.parametrize(
  ("runtime", "dtype", "said"),
  [
    ("tflite", None, "runtime: expected jax or onnxruntime, got 'tflite'"),
    ("onnxruntime", "bfloat16", "onnx: expected a model that computes in float32"),
  ],
)
def test_a_runtime_that_cannot_run_the_model_is_refused(runtime, dtype, said):
  with pytest.raises(UserError, match=said):
    latency.check(dataclasses.replace(SPEC, dtype=dtype), runtime, "latency_ms")


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"needs jax2onnx and onnxruntime, .* vitcomp_jax\[onnx\]"):
    latency.check(SPEC, "onnxruntime", "latency_ms")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"format": "vitcomp-plan"}, "expected a JSON object with"),
    ({"version": 2}, "expected version to be version 1, got 2"),
    ({"about": None}, "expected about to be an object"),
    ({"counts": [2, 10, 10, 197]}, "expected counts to be rising counts"),
    ({"counts": [0, 10, 60, 197]}, "expected counts to be rising counts"),
    ({"counts": 5}, "expected counts to be rising counts"),
    ({"mlp_ms": [1.0, 3.0]}, "expected mlp_ms to be 4 times that never fall"),
    ({"mlp_ms": [1.0, 3.0, 2.0, 5.0]}, "expected mlp_ms to be 4 times that never fall"),
    ({"attention_ms": [-1.0, 3.0, 4.0, 5.0]}, "expected attention_ms to be 4 times"),
    ({"reduction_ms": [0, 1, 2, "3"]}, "expected reduction_ms to be 4 times"),
    ({"fixed_ms": float("nan")}, "expected fixed_ms to be a time, got nan; remove it"),
  ],
)
def test_a_broken_table_is_refused(changes, said):
  with pytest.raises(UserError, match=said):
    parse_latency({**TABLE.to_json(), **changes}, "latency.json")


def test_a_file_that_is_no_json_is_refused(tmp_path):
  (tmp_path / "latency.json").write_text("{")
  with pytest.raises(UserError, match="remove it to measure anew"):
    latency.read(tmp_path / "latency.json", "jax")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what jax2onnx imports
def test_onnx_runtime_times_what_jax_would(monkeypatch):
  monkeypatch.setattr(latency, "_COUNTS", 3)  # instead of 11
  spec = small_spec()
  timed = {name: latency.programs(spec, 2, PruneMerge, name) for name in timing.RUNTIMES}
  assert timed["jax"].keys() == timed["onnxruntime"].keys()
  for key, expected in timed["jax"].items():
    found = timed["onnxruntime"][key]
    assert (found.runtime, found.batch) == ("onnxruntime", 2) and found.time_once() > 0
    np.testing.assert_allclose(found.run(), expected.run(), atol=1e-5)
  timing.take_turns(list(timed["onnxruntime"].values()), 0.0, 1)
  assert latency.tabulate(spec, timed["onnxruntime"], PruneMerge).fixed_ms > 0


@pytest.mark.parametrize("changes", [{}, {"num_registers": 3}, {"pool": "size_mean"}])
def test_what_is_timed_are_models(changes, monkeypatch):
  monkeypatch.setattr(latency, "_COUNTS", 4)  # instead of 11
  spec = small_spec(depth=latency._DEPTH, **changes)
  images = jax.ShapeDtypeStruct((2, *spec.image_size, 3), jnp.float32)
  params = jax.eval_shape(ViT(spec, spec.dense_layers).init, jax.random.key(0), images)
  for (kind, n), layers in latency._stacks(spec, reduction(spec, "mean_attention")).items():
    model = ViT(spec, layers)

    def shapes(params, images, model=model):
      out = model.apply(params, images, method="forward")
      return out.logits, [tokens.x for tokens in out.layers]

    logits, layers_out = jax.eval_shape(shapes, params, images)
    assert logits.shape == (2, spec.num_classes)
    counts = [x.shape[1] for x in layers_out]
    assert counts == [left for _, left in macs.static_counts(spec, layers)]
    expected = {"none": [], "whole": [n] * latency._DEPTH, "attention": [1] * latency._DEPTH}
    assert counts == expected.get(kind, sorted(set(counts), reverse=True))


def test_the_parts_are_told_apart():
  """Stacks that take known times give a table of these times."""

  def seconds(layers):
    total, n = 7.0, SPEC.num_tokens
    for layer in layers:
      n = layer.select.count(n)
      left = layer.reduce.count(n)
      removes = isinstance(layer.reduce, PruneMerge)
      total += 2.0 * n + 0.5 * n * removes + 3.0 * left
      n = left
    return 1e-3 * total

  stacks = latency._stacks(SPEC, PruneMerge)
  subjects = {k: types.SimpleNamespace(seconds=[seconds(v)]) for k, v in stacks.items()}
  table = latency.tabulate(SPEC, subjects, PruneMerge)
  assert table.counts[0] == 2 and table.counts[-1] == SPEC.num_tokens and table.fixed_ms == 7.0
  n = np.array(table.counts)
  # The MLP of the one token that is left counts as attention: a layer has one of either.
  np.testing.assert_allclose(table.attention_ms, 2.0 * n + 3.0)
  np.testing.assert_allclose(table.mlp_ms, 3.0 * n - 3.0)
  assert sum(kind == "reduction" for kind, _ in stacks) > 5
  inside = (n > 15) & (n < SPEC.num_tokens * 0.8)
  np.testing.assert_allclose(np.array(table.reduction_ms)[inside], 0.5 * n[inside], rtol=1e-6)
  assert table.static(SPEC, SPEC.dense_layers) == pytest.approx(7 + 12 * 5 * SPEC.num_tokens)
  assert macs.static_counts(SPEC, stacks["whole", 2])[0] == (2, 2)
