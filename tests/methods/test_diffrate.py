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
from vitcomp_jax.methods.diffrate import recipe as recipes
from vitcomp_jax.methods.diffrate.counts import candidates, expected_count, kept_count
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.caformer import caformer
from vitcomp_jax.models.layer_trees import of_layer, to_tree
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


def _random_rates(method, seed):
  """Counts that layers can keep, with their fractions: rates, and the plan they stand for."""
  rng = np.random.default_rng(seed)
  lengths = method.rates.lengths
  table = method.rates.clipped(lengths * rng.uniform(0.2, 1, lengths.shape))
  return method.rates.arch(table), method.static_layers(table)


def _sure_logits(spec, layers):
  """The authors' rates, sure of a static plan's counts."""

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


_ALL = {"compress_first": True, "compress_last": True}


@pytest.mark.parametrize("kind", _kinds("cls", "mean"))
@pytest.mark.parametrize("seed", SEEDS)
def test_masked_search_equals_static_plan(kind, seed):
  spec = SPECS[kind]
  method = DiffRate(spec, 1.0, DiffRateOptions(**_ALL))
  arch, layers = _random_rates(method, seed)
  _check_parity(method, method.layers(), arch, layers, random_params(spec, seed), seed)


@pytest.mark.parametrize("kind", _kinds("cls", "mean"))
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_replayed_by_masking_equals_it(kind, seed):
  spec = SPECS[kind]
  method, layers = DiffRate(spec, 1.0), _random_plan(spec, seed)
  arch = method.replayed_arch(layers)
  _check_parity(method, method.replayed_layers(), arch, layers, random_params(spec, seed), seed)


@pytest.mark.parametrize("kind", _kinds("cls"))
def test_the_authors_search_equals_its_plan_but_for_their_clamp(kind, monkeypatch):
  spec = SPECS[kind]
  for name in ("_PAPER", "_PAPER_CAFORMER"):
    monkeypatch.setattr(recipes, name, dataclasses.replace(recipes.OURS, learns_shares=False))
  method = DiffRate(spec, 1.0, DiffRateOptions(recipe="paper", **_ALL))
  layers = _random_plan(spec, 0)
  arch = _sure_logits(spec, layers)
  _check_parity(method, method.layers(), arch, layers, random_params(spec), 0)
  assert method.static_layers(method.expected_counts(arch)) == layers


@pytest.mark.parametrize(
  ("seed", "depth"), [(0, 4), *(pytest.param(seed, 8, marks=pytest.mark.slow) for seed in range(3))]
)
def test_masked_search_equals_static_plan_on_trained_weights(seed, depth):
  """Trained attention is sharp: a dropped token may outweigh all that are kept."""
  model, params = vc.load("vit_mini_patch3_30", "bundled")
  method = DiffRate(dataclasses.replace(model.spec, depth=depth), 1.0, DiffRateOptions(**_ALL))
  arch, layers = _random_rates(method, seed)
  _check_parity(method, method.layers(), arch, layers, params, seed)


def _check_parity(method, masked_layers, arch, layers, params, seed):
  spec = method.spec
  images = random_images(spec, 3, seed)
  masked = forward(spec, masked_layers, {"params": params, "arch": arch}, images)
  static = forward(spec, layers, {"params": params}, images)
  np.testing.assert_allclose(masked.logits, static.logits, rtol=0, atol=1e-5)
  counts = [int(tokens.num_kept) for tokens in masked.layers]
  assert counts == [n for _, n in macs.static_counts(spec, layers)]
  spent = method.penalty(arch, masked, jnp.asarray(0))[1]["gmacs"]
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
  method = DiffRate(spec, 1.0, DiffRateOptions(recipe=recipe, **_ALL))
  params, images = random_params(spec), random_images(spec, 3)
  if recipe == "ours":
    arch = _random_rates(method, 1)[0]
  else:
    arch = jax.tree.map(lambda x: x / 50, _sure_logits(spec, _random_plan(spec, 1)))

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
  variables = {"params": params, "arch": _sure_logits(spec, layers)}
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
  state, batch, _, step = _step(SPECS["cls"], SearchConfig(loss=loss))
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


def _learnt(method, seed):
  """Rates that a search may have come to, some of them out of their range."""
  rng = np.random.default_rng(seed)
  full = jax.device_get(method.rates.init())
  return jax.tree.map(lambda a: a - rng.uniform(-0.2, 0.8), full)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
  "fraction", [0.65, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.4, 0.9))]
)
def test_adjusted_plan_meets_the_budget(seed, fraction):
  spec = small_spec(image_size=(56, 56), depth=12)
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  method = DiffRate(spec, fraction * dense)
  expected = method.expected_counts(_learnt(method, seed))
  table, offset = method.adjusted(expected)
  spent = macs.static_macs(spec, method.static_layers(table)) / 1e9
  assert abs(spent / dense - fraction) <= 0.01 * fraction
  moved = method.rates.clipped(expected + offset * spec.num_patches)
  np.testing.assert_allclose(table, moved, rtol=0, atol=2e-3)


def test_counts_of_a_plan_are_whole_tiles():
  spec = small_spec(image_size=(56, 56), depth=12)
  target = 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9
  method = DiffRate(spec, target, DiffRateOptions(tile=8))
  layers = method.deploy(_learnt(method, 0))
  counts = {c for layer in layers for c in (layer.reduce.prune_keep, layer.reduce.merge_keep)}
  assert len(counts) > 2 and all(c % 8 == 0 or c == spec.num_tokens for c in counts)
  assert abs(macs.static_macs(spec, layers) / 1e9 / method.target - 1) < 0.02


@pytest.mark.parametrize("kind", ["cls", "distilled", "mean", "siglip"])
def test_what_nobody_reads_is_not_kept(kind):
  """After the last layer only a head that pools patches reads them; one has to stay."""
  spec = SPECS[kind]
  method = DiffRate(spec, 1.0, DiffRateOptions(compress_last=True))
  arch = method.rates.init()
  assert ("reduce" in of_layer(spec, arch, spec.depth - 1)) == spec.pools_patches
  last = method.static_layers(method.expected_counts(jax.device_get(arch)))[-1].reduce
  kept = spec.num_tokens if spec.pools_patches else spec.num_prefix + 1
  assert (last.prune_keep, last.merge_keep) == (kept, kept)


@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_an_offset_is_a_share_of_each_list(recipe):
  spec = SPECS["caformer"]
  rates = DiffRate(spec, 1.0, DiffRateOptions(recipe=recipe)).rates
  patches = np.array([[spec.patches_at(i)] for i in range(spec.depth)])
  table = np.repeat(patches / 2, 2, axis=1)
  change = rates.shifted(table, -0.25) - rates.shifted(table, 0.0)
  learnt = change != 0
  assert learnt.any()
  np.testing.assert_allclose((change / patches)[learnt], -0.25, atol=0.02)


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
