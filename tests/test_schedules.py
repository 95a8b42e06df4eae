"""Hand-made schedules: near the budget, and on the layers that a search compresses."""

import dataclasses

import pytest

from tests.models import small_spec
from vitcomp_jax import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate import DiffRate
from vitcomp_jax.models.reducers import PruneMerge
from vitcomp_jax.schedules import HAND_MADE, hand_made


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("pool", ["cls", "size_mean"])
@pytest.mark.parametrize("name", HAND_MADE)
def test_a_schedule(name, pool, fraction):
  # One count for all layers comes within 1 % only where a token is a small share of them.
  spec = small_spec(image_size=(64, 64), depth=6, pool=pool)
  target = fraction * macs.static_macs(spec, spec.dense_layers) / 1e9
  layers = hand_made(name, spec, target)
  assert macs.static_macs(spec, layers) / 1e9 == pytest.approx(target, rel=0.01)

  changed = [layer != dense for layer, dense in zip(layers, spec.dense_layers, strict=True)]
  assert changed == [False, True, True, True, True, pool == "cls"]
  assert tuple(changed) == DiffRate(target).is_compressed(spec)

  (reducer,) = {layer.reduce for layer, yes in zip(layers, changed, strict=True) if yes}
  prune_keep = reducer.merge_keep if name == "uniform" else spec.num_tokens
  assert reducer == PruneMerge(prune_keep, reducer.merge_keep)
  dense = dataclasses.replace(layers[1], reduce=spec.dense_layers[1].reduce)
  assert dense == spec.dense_layers[1]


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_budget_of_the_dense_model_removes_nothing(name):
  spec = small_spec()
  dense = macs.static_macs(spec, spec.dense_layers)
  assert macs.static_macs(spec, hand_made(name, spec, dense / 1e9)) == dense


def test_an_unknown_schedule():
  with pytest.raises(UserError, match=r"baselines: expected some of .*uniform.*, got 'unifrom'"):
    hand_made("unifrom", small_spec(), 1.0)
