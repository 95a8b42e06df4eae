"""Schedules without a search: near the budget, and the authors' rules."""

import numpy as np
import pytest

from tests.models import forward, random_images, random_params, small_spec
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods import evit, handmade, tome
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.evit import AttentiveSelect
from vitcomp_jax.methods.registry import schedules, within
from vitcomp_jax.methods.tome import BipartiteMerge
from vitcomp_jax.plans import make_plan, parse_plan


def reducers(layers):
  return [layer.reduce for layer in layers]


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("pool", ["cls", "size_mean"])
@pytest.mark.parametrize("name", schedules())
def test_a_schedule_meets_its_budget(name, pool, fraction):
  spec = small_spec(image_size=(64, 64), depth=6, pool=pool)
  target = fraction * macs.static_macs(spec, spec.dense_layers) / 1e9
  layers = within(name, spec, target)
  assert macs.static_macs(spec, layers) / 1e9 == pytest.approx(target, rel=0.01)
  counts = [n for _, n in macs.static_counts(spec, layers)]
  assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("name", ["uniform", "uniform_merge", "linear", "linear_merge", "random"])
@pytest.mark.parametrize("pool", ["cls", "size_mean"])
def test_hand_made_schedules_compress_what_a_search_does(name, pool):
  spec = small_spec(image_size=(64, 64), depth=6, pool=pool)
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  found = reducers(within(name, spec, 0.6 * dense))
  changed = [isinstance(reduce, PruneMerge) for reduce in found]
  method = DiffRate(spec, 0.6 * dense)
  searched = macs.static_counts(spec, method.static_layers(method.starts()["linear"]))
  assert changed == [after < before for before, after in searched]
  kept = [reduce for reduce in found if isinstance(reduce, PruneMerge)]
  for reduce in kept:
    prune_keep = spec.num_tokens if name.endswith("merge") else reduce.merge_keep
    assert reduce.prune_keep == prune_keep
    assert reduce.importance == ("random" if name == "random" else "cls")
  if name.startswith("uniform"):
    assert kept[0].merge_keep - kept[-1].merge_keep <= 1
  if name.startswith("linear"):
    steps = np.diff([reduce.merge_keep for reduce in kept])
    assert steps.max() - steps.min() <= 1 and steps.max() < 0


@pytest.mark.parametrize("name", schedules())
def test_a_budget_of_the_dense_model_removes_nothing(name):
  spec = small_spec()
  dense = macs.static_macs(spec, spec.dense_layers)
  assert macs.static_macs(spec, within(name, spec, dense / 1e9)) == dense


def test_an_unknown_schedule():
  with pytest.raises(UserError, match=r"schedule: expected one of uniform, .*, got 'unifrom'"):
    within("unifrom", small_spec(), 1.0)


def test_a_budget_out_of_reach_is_refused():
  with pytest.raises(UserError, match="what evit costs small at its strongest, got 1e-06"):
    within("evit", small_spec(), 1e-6)


def test_importance_is_that_of_hand_made_schedules_but_random():
  spec = small_spec()
  target = 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9
  for name, expected in (("linear_merge", "value_norm"), ("random", "random")):
    found = reducers(within(name, spec, target, "value_norm"))
    assert {r.importance for r in found if isinstance(r, PruneMerge)} == {expected}
  assert within("tome", spec, target, "value_norm") == within("tome", spec, target)


def test_tome_counts():
  assert tome.tome_counts(4, 3) == [4, 4, 4]
  assert tome.tome_counts([5, 0, 2], 4) == [5, 0, 2, 0]
  assert tome.tome_counts((6, -1), 6) == [12, 9, 7, 4, 2, 0]
  assert tome.tome_counts((6, 1), 6) == [0, 2, 4, 7, 9, 12]


def test_tome_merges_at_most_half():
  spec = small_spec(num_registers=2)  # 36 patches
  found = reducers(tome.layers(spec, 30))
  assert [r.remove for r in found if isinstance(r, BipartiteMerge)] == [18, 9, 4, 2]


def test_tome_late_merges_late():
  spec = small_spec(image_size=(64, 64), depth=6)
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  late = [spec.num_tokens] + [
    n for _, n in macs.static_counts(spec, within("tome_late", spec, 0.8 * dense))
  ]
  assert (np.diff(-np.diff(late)) >= 0).all()


def test_evit_counts_the_fused_token():
  found = reducers(evit.layers(small_spec(), [1, 0.5, 0.5, 1]))
  assert [r.keep for r in found if isinstance(r, AttentiveSelect)] == [19, 11]  # 36 -> 18+1 -> 10+1


@pytest.mark.parametrize("name", schedules())
def test_a_schedule_is_a_plan(name):
  spec = small_spec()
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  layers = within(name, spec, 0.6 * dense)
  plan = parse_plan(make_plan(spec, layers, {}).to_json())
  assert [layer.reduce for layer in plan.layers] == reducers(layers)


# One of each reducer in the quick run.
_KINDS = ("uniform", "uniform_merge", "tome", "evit", "dynamicvit")
_MORE = [pytest.param(name, marks=pytest.mark.slow) for name in schedules() if name not in _KINDS]


@pytest.mark.parametrize("name", [*_KINDS, *_MORE])
def test_permuting_a_batch_permutes_the_logits(name):
  spec = small_spec()
  dense = macs.static_macs(spec, spec.dense_layers) / 1e9
  layers = within(name, spec, 0.6 * dense)
  params, images = random_params(spec, layers=layers), random_images(spec, 5)
  order = np.array([3, 1, 4, 0, 2])
  straight = forward(spec, layers, {"params": params}, images)
  permuted = forward(spec, layers, {"params": params}, images[order])
  np.testing.assert_allclose(permuted.logits, straight.logits[order], rtol=0, atol=1e-6)


def test_evits_warmup_has_eight_sets_of_rates():
  spec = small_spec(image_size=(64, 64), depth=6)
  layers = evit.layers(spec, [1, 0.5, 0.8, 1, 0.5, 0.9])
  phases = evit.warmup(spec, layers, 100)
  assert len(phases) == 8 and phases[0] == (0, spec.dense_layers) and phases[-1] == (100, layers)
  costs = [macs.static_macs(spec, phase) for _, phase in phases]
  assert costs == sorted(costs, reverse=True) and len(set(costs)) == 8


def test_random_schedules_are_near_the_budget_and_differ():
  spec = small_spec(image_size=(64, 64), depth=6)
  target = 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9
  found = list(handmade.random_counts(spec, target, 50, seed=1))
  assert len(set(found)) == 50
  for layers in found:
    assert macs.static_macs(spec, layers) / 1e9 == pytest.approx(target, rel=0.01)
    kept = [n for r in reducers(layers)[1:] for n in (r.prune_keep, r.merge_keep)]
    assert kept == sorted(kept, reverse=True)
  assert list(handmade.random_counts(spec, target, 20, seed=1)) == found[:20]


def test_random_schedules_out_of_reach_are_refused():
  with pytest.raises(UserError, match="random schedules: expected some near 1e-06 GMACs for small"):
    next(handmade.random_counts(small_spec(), 1e-6, 1, seed=0))
