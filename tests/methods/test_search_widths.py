"""One search of tokens and widths: its starts, and the network that it deploys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import forward, random_images, random_params, small_spec
from tests.test_families import FAMILIES
from vitcomp_jax.config import DiffRateOptions
from vitcomp_jax.cost import macs
from vitcomp_jax.cost.cost_models import Latency
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.widths.calibration import calibrate
from vitcomp_jax.methods.widths.factors import factorise

KINDS = {"deit": {}, **FAMILIES}
SPEC = small_spec(depth=3, num_heads=4, mlp_dim=24)
DEEP = small_spec(depth=6)
DENSE, DEEP_DENSE = (macs.static_macs(s, s.dense_layers) / 1e9 for s in (SPEC, DEEP))


def kinds(*quick):
  return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]


@functools.cache
def _factored(name):
  spec = small_spec(depth=3, num_heads=4, mlp_dim=24, **KINDS[name])
  params = random_params(spec)
  return spec, params, factorise(spec, params, calibrate(spec, params, [random_images(spec, 4)]))


def _random_table(method, seed=0):
  rng = np.random.default_rng(seed)
  lengths = method.rates.lengths
  return method.rates.clipped(lengths * rng.uniform(0.3, 1, lengths.shape))


@pytest.mark.parametrize("name", kinds("deit", "dinov3"))
@pytest.mark.parametrize("what", ["both", pytest.param("widths", marks=pytest.mark.slow)])
def test_the_slimmed_network_equals_the_masked_one(name, what):
  spec, params, factors = _factored(name)
  method = DiffRate(spec, 1.0, DiffRateOptions(what=what))
  table = _random_table(method)
  arch, images = method.rates.arch(table), random_images(spec, 2, seed=1)
  variables = {"params": method.masked(params, arch, factors), "arch": arch}
  masked = forward(spec, method.layers(), variables, images)
  layers, small = method.deployment.slimmed(params, table, factors)
  slim = forward(spec, layers, {"params": small}, images)
  np.testing.assert_allclose(masked.logits, slim.logits, rtol=0, atol=1e-5)
  removes = [isinstance(layer.reduce, PruneMerge) for layer in layers]
  assert removes == [what == "both"] * spec.depth
  # What the search counts, and adjusts to the budget, is what the network costs.
  cost = macs.static_macs(spec, layers)
  assert cost == macs.static_macs(spec, method.static_layers(table))
  spent, metrics = method.penalty(arch, masked, jnp.asarray(0))
  np.testing.assert_allclose(metrics["gmacs"] * 1e9, cost, rtol=1e-6)
  assert cost < 0.9 * macs.static_macs(spec, spec.dense_layers) and spent > 0
  found = [tuple(np.asarray(row, int).tolist()) for row in metrics["widths"]]
  assert found == [tuple(layer.widths) for layer in layers]


def test_every_rate_has_a_gradient():
  spec, params, factors = _factored("deit")
  method = DiffRate(spec, 1e-4, DiffRateOptions(what="both"))
  layers, images = method.layers(logits_only=True), random_images(spec, 2)

  @jax.jit
  def gradients(arch):
    def terms(arch):
      variables = {"params": method.masked(params, arch, factors), "arch": arch}
      out = forward(spec, layers, variables, images)
      return jnp.sum(jnp.sin(out.logits)), method.penalty(arch, out, jnp.asarray(0))[0]

    return jax.jacrev(terms)(arch)

  by_task, by_budget = gradients(method.rates.arch(_random_table(method)))
  count = 3 * spec.depth + 2  # of widths, and of tokens in the one layer between
  for found in (by_task, by_budget):
    assert len(jax.tree.leaves(found)) == count
  assert all(x != 0 for x in jax.tree.leaves(by_task))
  # To prune a token or to merge it costs the same.
  assert by_budget["blocks_1"]["reduce"].pop("prune") == 0
  assert all(x > 0 for x in jax.tree.leaves(by_budget))


@pytest.mark.parametrize("what", ["tokens", "widths", "both"])
@pytest.mark.parametrize(
  "fraction", [0.6, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.45, 0.9))]
)
def test_starts_are_on_the_budget(what, fraction):
  target = fraction * DEEP_DENSE
  method = DiffRate(DEEP, target, DiffRateOptions(what=what))
  starts = method.starts()
  assert len(starts) == {"tokens": 7, "widths": 1, "both": 6}[what]
  for table in starts.values():
    for found in (table, method.expected_counts(method.rates.arch(table))):
      assert macs.static_macs(DEEP, method.static_layers(found)) / 1e9 <= target
    # One element more of every list would be past it.
    more = method.rates.clipped(np.where(method.rates.learns, table + 1, table))
    assert macs.static_macs(DEEP, method.static_layers(more)) / 1e9 > target
  first = next(iter(starts.values()))
  np.testing.assert_allclose(method.expected_counts(method.init()), first, atol=1e-4)


@pytest.mark.parametrize(("actions", "kept"), [("prune", 0), ("merge", 1)])
def test_starts_do_only_what_they_may(actions, kept):
  spec = small_spec(image_size=(56, 56), depth=5)
  target = 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9
  method = DiffRate(spec, target, DiffRateOptions(actions=actions))
  for table in method.starts().values():
    before = np.r_[spec.num_patches, table[:-1, 1]]
    expected = (table[:, 1], before)[kept]
    np.testing.assert_array_equal(table[1:-1, 0], expected[1:-1])


def test_shapes_that_reach_zero_meet_low_budgets_too():
  for share in (0.9, 0.4):
    found = DiffRate(DEEP, share * DEEP_DENSE).starts()
    assert [*found] == [
      *("linear", "flat, pruned", "early", "late", "s_shaped"),
      *("linear, merged", "flat, merged"),
    ]
  assert found["late"][-2, 1] == 1 < found["flat, pruned"][-2, 1]


@pytest.mark.parametrize("what", ["tokens", "widths", "both"])
def test_the_smallest_plan_has_a_start(what):
  method = DiffRate(SPEC, 1.0, DiffRateOptions(what=what))
  method = DiffRate(SPEC, 1.001 * method._smallest(), DiffRateOptions(what=what))
  method.check()
  layers = method.static_layers(method.expected_counts(method.init()))
  assert macs.static_macs(SPEC, layers) / 1e9 <= method.target
  assert method.deploy(method.init()) == layers


def test_counts_of_widths_are_whole_tiles_and_pairs():
  spec, params, factors = _factored("dinov3")
  target = 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9
  plain, tiled = (DiffRate(spec, target, DiffRateOptions(what="both", tile=n)) for n in (1, 4))
  for method, tile, pair in ((plain, 1, 2), (tiled, 4, 4)):
    layers = method.deployment.slimmed(params, _random_table(method), factors)[0]
    assert all(layer.head_dim % pair == 0 for layer in layers)
    assert all(layer.mlp_dim % tile == layer.widths.value // 4 % tile == 0 for layer in layers)


SLIMMED = tuple(dataclasses.replace(layer, mlp_dim=16) for layer in SPEC.dense_layers)
TABLE = Latency((2, 37), (1.0, 40.0), (0.5, 3.0), (1.0, 42.0), 5.0)


@pytest.mark.parametrize(
  ("options", "changes", "said"),
  [
    ({"recipe": "paper"}, {}, "with recipe=paper, which searches tokens only"),
    ({}, {"cost": TABLE, "target": 100.0}, "with a budget in ms"),
    ({}, {"base": SLIMMED}, "with layers that are slimmed already"),
  ],
)
@pytest.mark.parametrize("what", ["widths", "both"])
def test_widths_that_cannot_be_searched_are_refused(what, options, changes, said):
  fields = {"spec": SPEC, "target": 0.7 * DENSE} | changes
  with pytest.raises(UserError, match=f"config.search.what: expected tokens.* got {what}.*{said}"):
    DiffRate(options=DiffRateOptions(what=what, **options), **fields).check()


def test_a_model_whose_norms_read_all_widths_has_none_to_search():
  spec = small_spec(mlp_norm=True, qk_norm=True, attn_norm=True)
  said = "config.search.what: expected tokens for small, whose norms read all .*, got both"
  with pytest.raises(UserError, match=said):
    DiffRate(spec, 1e-3, DiffRateOptions(what="both")).check()


@pytest.mark.parametrize(("recipe", "most"), [("ours", 1), ("paper", 36)])
def test_candidates_further_apart_are_refused(recipe, most):
  options = DiffRateOptions(recipe=recipe, granularity=most + 1)
  said = f"config.search.granularity: expected 1 to {most} with recipe={recipe}, got {most + 1}"
  with pytest.raises(UserError, match=said):
    DiffRate(SPEC, 0.7 * DENSE, options).check()
