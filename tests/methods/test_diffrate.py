"""The search sees what it deploys, trains the rates only, and starts where it should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vitcomp_jax as vc
from tests.models import forward, random_images, random_params, small_spec
from vitcomp_jax.config import DiffRateOptions, ParallelConfig, SearchConfig
from vitcomp_jax.cost import macs
from vitcomp_jax.data.transforms import Preprocess
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.diffrate.masking import candidates, expected_count, kept_count
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.caformer import caformer
from vitcomp_jax.models.layer_trees import to_tree
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.parallel import Layout
from vitcomp_jax.training.search import SearchTrainer
from vitcomp_jax.training.step import init_state, make_step, with_rows

# Three layers: the first, one between, and the last.
_short = functools.partial(small_spec, depth=3)
SPECS = {
  "cls": _short(),
  "mean": _short(pool="size_mean", final_norm=False, fc_norm=True),
  "distilled": _short(distilled=True, pool="cls_dist"),
  "registers": _short(num_registers=3, pos_on_prefix=False, layer_scale=True),
  "clip": _short(norm_pre=True, activation="quick_gelu"),
  "caformer": caformer("tiny", (64, 64), (1, 1, 3, 2), (8, 8, 32, 32), num_classes=7),
  "siglip": _short(class_token=False, pool="map", activation="gelu_tanh"),
}


def _kinds(*at_once):
  """All kinds; those that differ little from these are slow."""
  slow = [pytest.param(kind, marks=pytest.mark.slow) for kind in SPECS if kind not in at_once]
  return [*at_once, *slow]


def _random_plan(spec, seed):
  rng = np.random.default_rng(seed)
  most = np.array([[spec.patches_at(i)] for i in range(spec.depth)])
  counts = rng.integers(1, most + 1, (spec.depth, 2)) + spec.num_prefix
  return tuple(
    dataclasses.replace(layer, reduce=PruneMerge(int(p), int(m), importance=spec.importance()))
    for layer, (p, m) in zip(spec.dense_layers, counts, strict=True)
  )


def _arch_of(spec, layers):
  """Rates that are sure of a static plan's counts."""

  def sure(layer, count):
    options = candidates(spec.patches_at(layer), 1)
    return jnp.where(options == count - spec.num_prefix, 100.0, 0.0)

  return to_tree(
    spec,
    [
      {
        "reduce": {
          "prune_logits": sure(i, layer.reduce.prune_keep),
          "merge_logits": sure(i, layer.reduce.merge_keep),
        }
      }
      for i, layer in enumerate(layers)
    ],
  )


def _together(source):
  """Which patches share a token, whatever its place: near-equal importances may swap."""
  return (source[:, :, None] == source[:, None]) | (
    (source < 0)[:, :, None] & (source < 0)[:, None]
  )


# Random plans; one of them at once.
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", _kinds("cls", "mean"))
@pytest.mark.parametrize("seed", SEEDS)
def test_masked_search_equals_static_plan(kind, seed):
  spec = SPECS[kind]
  _check_parity(spec, _random_plan(spec, seed), random_params(spec, seed), seed)


@pytest.mark.parametrize(
  ("seed", "depth"), [(0, 4), *(pytest.param(seed, 8, marks=pytest.mark.slow) for seed in range(3))]
)
def test_masked_search_equals_static_plan_on_trained_weights(seed, depth):
  """Trained attention is sharp: a dropped token may outweigh all that are kept."""
  model, params = vc.load("vit_mini_patch3_30", "bundled")
  spec = dataclasses.replace(model.spec, depth=depth)
  _check_parity(spec, _random_plan(spec, seed), params, seed)


def _check_parity(spec, layers, params, seed):
  method = DiffRate(spec, 1.0, DiffRateOptions(compress_first=True, compress_last=True))
  images = random_images(spec, 3, seed)
  variables = {"params": params, "arch": _arch_of(spec, layers)}
  masked = forward(spec, method.layers(), variables, images)
  static = forward(spec, layers, {"params": params}, images)
  np.testing.assert_allclose(masked.logits, static.logits, rtol=0, atol=1e-5)
  tried = {"params": params, "arch": method.replayed_arch(layers)}
  given = forward(spec, method.replayed_layers(), tried, images)
  np.testing.assert_allclose(given.logits, static.logits, rtol=0, atol=1e-5)
  counts = [int(tokens.num_kept) for tokens in masked.layers]
  assert counts == [n for _, n in macs.static_counts(spec, layers)]
  spent = method.penalty(variables["arch"], masked, jnp.asarray(0))[1]["gmacs"]
  np.testing.assert_allclose(spent * 1e9, macs.static_macs(spec, layers), rtol=1e-6)
  held, expected = np.asarray(masked.tokens.source), np.asarray(static.tokens.source)
  np.testing.assert_array_equal(_together(held), _together(expected))
  np.testing.assert_allclose(vc.unmerge(masked.tokens), vc.unmerge(static.tokens), atol=1e-4)


@pytest.mark.parametrize(
  ("kind", "recipe"),
  [
    ("cls", "ours"),
    pytest.param("cls", "paper", marks=pytest.mark.slow),
    pytest.param("mean", "ours", marks=pytest.mark.slow),
    pytest.param("distilled", "ours", marks=pytest.mark.slow),
  ],
)
def test_logits_alone_need_no_more_than_the_head_reads(kind, recipe):
  spec = SPECS[kind]
  options = DiffRateOptions(recipe=recipe, compress_first=True, compress_last=True)
  method = DiffRate(spec, 1.0, options)
  params, images = random_params(spec), random_images(spec, 3)
  arch = jax.tree.map(lambda x: x / 50, _arch_of(spec, _random_plan(spec, 1)))

  def figures(arch, layers):
    out = ViT(spec, layers).apply({"params": params, "arch": arch}, images, method="forward")
    penalty, _ = method.penalty(arch, out, jnp.asarray(0))
    return jnp.sum(out.logits**2) + penalty, out.logits

  both = [method.layers(logits_only=given) for given in (False, True)]
  assert (both[0] == both[1]) == spec.pools_patches
  whole, less = (
    jax.jit(jax.value_and_grad(lambda a, l=l: figures(a, l), has_aux=True))(arch) for l in both
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, less)


def test_authors_clamp_sees_something_else():
  spec = SPECS["cls"]
  layers = _random_plan(spec, 3)
  params, images = random_params(spec), random_images(spec, 3)
  variables = {"params": params, "arch": _arch_of(spec, layers)}
  method = DiffRate(spec, 1.0, DiffRateOptions(recipe="paper", compress_first=True))
  masked = forward(spec, method.layers(), variables, images)
  static = forward(spec, layers, {"params": params}, images)
  assert np.abs(masked.logits - static.logits).max() > 1e-3


@pytest.mark.parametrize("num_patches", [64, 100, 196, 256, 1369])
@pytest.mark.parametrize("granularity", [1, 4])
def test_even_start_is_not_rounded_up_by_noise(num_patches, granularity):
  options = candidates(num_patches, granularity)
  expected = expected_count(jnp.zeros(options.shape), options)
  assert int(kept_count(expected, num_patches)) == int(np.ceil(options.mean()))


def _step(spec, config):
  method = DiffRate(spec, 0.8 * macs.static_macs(spec, spec.dense_layers) / 1e9, config)
  pre = Preprocess(spec.image_size, spec.mean, spec.std, spec.crop_pct, spec.interpolation)
  tx = optax.adam(0.1)
  arch = method.init()
  state = init_state(random_params(spec), arch, tx, ("arch",), 0)
  layout = Layout(ParallelConfig(devices=1))
  loss_fn = SearchTrainer(method, config, pre, layout).loss()
  shape = (8, *spec.image_size, 3)
  images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  labels = jnp.arange(8, dtype=jnp.int32) % spec.num_classes
  batch = {"image": jnp.asarray(images), "label": labels}
  state = layout.put_state(state)
  return state, batch, loss_fn, make_step(loss_fn, tx, ("arch",), layout)


@pytest.mark.parametrize(
  "loss", ["labels", "logits", pytest.param("features", marks=pytest.mark.slow)]
)
def test_search_trains_rates_only_and_never_recompiles(loss, optax_promotion):
  state, batch, _, step = _step(SPECS["cls"], SearchConfig(loss=loss, granularity=4))
  before = jax.device_get((state.params, state.arch))
  for _ in range(3):
    state, figures = step(state, batch, None)
  assert step._cache_size() == 1
  jax.tree.map(np.testing.assert_array_equal, before[0], jax.device_get(state.params))
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before[1], jax.device_get(state.arch))
  assert any(jax.tree.leaves(moved))
  assert np.isfinite(figures["loss"])


def test_search_step_has_no_weight_gradients(optax_promotion):
  """By XLA's count: backward without weight gradients costs about what forward does."""
  spec = small_spec(width=96, mlp_dim=384, num_heads=3, depth=3)
  state, batch, loss_fn, step = _step(spec, SearchConfig())
  rest = (None, with_rows(batch), jax.random.key(0), jnp.asarray(0))

  def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

  forward_only = flops(lambda p, a: loss_fn(p, a, *rest), state.params, state.arch)
  whole = step.lower(state, batch, None).compile().cost_analysis()["flops"]
  weights_too = flops(
    jax.grad(lambda p, a: loss_fn(p, a, *rest)[0], argnums=(0, 1)), state.params, state.arch
  )
  assert whole < 2.2 * forward_only
  assert weights_too > 2.6 * forward_only


@pytest.mark.parametrize("seed", [*SEEDS, pytest.param(3, marks=pytest.mark.slow)])
def test_adjusted_plan_meets_the_budget(seed):
  spec = small_spec(image_size=(56, 56), depth=12)
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  for fraction in (0.4, 0.65, 0.9):
    method = DiffRate(spec, fraction * dense)
    arch = method.init()
    rng = np.random.default_rng(seed)
    arch = jax.tree.map(lambda a, rng=rng: a + 3 * rng.standard_normal(a.shape), arch)
    layers, _ = method.deploy_counts(method.expected_counts(jax.device_get(arch)))
    assert abs(macs.static_macs(spec, layers) / 1e9 / dense - fraction) <= 0.01 * fraction


def test_counts_of_a_plan_are_whole_tiles():
  spec = small_spec(image_size=(56, 56), depth=12)
  target = 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9
  method = DiffRate(spec, target, DiffRateOptions(tile=8))
  rng = np.random.default_rng(0)
  arch = jax.tree.map(lambda a: a + 3 * rng.standard_normal(a.shape), method.init())
  layers, _ = method.deploy_counts(method.expected_counts(jax.device_get(arch)))
  counts = {c for layer in layers for c in (layer.reduce.prune_keep, layer.reduce.merge_keep)}
  assert len(counts) > 2 and all(c % 8 == 0 or c == spec.num_tokens for c in counts)
  assert abs(macs.static_macs(spec, layers) / 1e9 / method.target - 1) < 0.02


@pytest.mark.parametrize("actions", ["both", "prune", "merge"])
@pytest.mark.parametrize(
  "fraction", [0.65, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.4, 0.9))]
)
def test_merge_first_starts_on_the_budget(actions, fraction):
  spec = small_spec(image_size=(56, 56), depth=12)
  target = fraction * macs.static_macs(spec, spec.dense_layers)
  method = DiffRate(spec, target / 1e9, DiffRateOptions(actions=actions))
  layers = method.static_layers(method.expected_counts(jax.device_get(method.init())))
  # One token more in every layer would be past it.
  assert 0.97 * target <= macs.static_macs(spec, layers) <= target
  for layer in layers[1:]:
    pruned, merged = layer.reduce.prune_keep, layer.reduce.merge_keep
    assert merged == spec.num_tokens if actions == "prune" else pruned == spec.num_tokens


def test_budget_below_the_smallest_plan_is_refused():
  with pytest.raises(UserError, match="smallest plan"):
    DiffRate(small_spec(), 1e-6).check()


@pytest.mark.parametrize("kind", _kinds("cls"))
def test_logits_do_not_depend_on_the_batch(kind):
  spec = SPECS[kind]
  layers, params = _random_plan(spec, 1), random_params(spec)
  images = random_images(spec, 6)
  order = np.array([3, 1, 5, 0, 2, 4])
  logits = forward(spec, layers, {"params": params}, images).logits
  permuted = forward(spec, layers, {"params": params}, images[order]).logits
  np.testing.assert_allclose(permuted, logits[order], rtol=0, atol=1e-5)
  alone = forward(spec, layers, {"params": params}, images[2:3]).logits
  np.testing.assert_allclose(alone, logits[2:3], rtol=0, atol=1e-5)
