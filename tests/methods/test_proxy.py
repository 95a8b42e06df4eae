"""The gradients by which counts are learnt: of a learnt count, and of what it drops and merges."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import random_images, random_params, small_spec
from vitcomp_jax.methods.diffrate.counts import Choice, GivenCounts
from vitcomp_jax.methods.diffrate.masking import MaskedPruneMerge
from vitcomp_jax.methods.proxy import SPREAD, learnt_count
from vitcomp_jax.models.build import build
from vitcomp_jax.ops.straight_through import ste_clip

LENGTH, FIRST = 20, 1


def _counted(share, low=2.0, high=21.0):
  return learnt_count(share, LENGTH, jnp.float32(low), jnp.float32(high), FIRST)


@pytest.mark.parametrize(
  ("share", "high", "count"),
  [(0.5, 21, 11), (0.501, 21, 12), (0.01, 21, 2), (-1.0, 21, 2), (1.5, 21, 21), (0.9, 15, 15)],
)
def test_a_count_is_the_share_rounded_up_within_its_range(share, high, count):
  mask, found = _counted(jnp.float32(share), high=high)
  assert found == count
  ranks = np.arange(FIRST + LENGTH)
  # What is gone already is another mask's to drop.
  np.testing.assert_array_equal(mask, (ranks < count) | (ranks >= high))


def test_a_whole_count_is_not_rounded_up_by_noise():
  for length in (64, 196, 1369, 3072):
    low, high = jnp.float32(1), jnp.float32(length)
    count = jax.jit(lambda share, n=length, a=low, b=high: learnt_count(share, n, a, b)[1])
    for expected in (1, length // 3, length - 1, length):
      assert count(jnp.float32(expected / length)) == expected


def test_the_gradient_is_that_of_the_probability_to_be_kept():
  share, ranks = 0.43, np.arange(FIRST + LENGTH)
  assert jax.grad(lambda s: _counted(s)[1])(share) == LENGTH
  gradient = jax.jacrev(lambda s: _counted(s)[0])(share)
  step = 1e-5

  def kept(share):  # that the count is above the rank, if it is logistic
    above = (share * LENGTH + FIRST - ranks - 0.5) / (SPREAD * LENGTH)
    return np.where(ranks < 2, 1, 1 / (1 + np.exp(-above)))

  expected = (kept(share + step) - kept(share - step)) / (2 * step)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
  assert 2 < np.sum(gradient > 1) < 10  # a few elements on either side feel it


@pytest.mark.parametrize(
  ("x", "down", "up"), [(0.5, 1, 1), (0.0, 1, 1), (1.0, 1, 1), (-0.2, 0, 1), (1.2, 1, 0)]
)
def test_a_clipped_number_is_not_pushed_further_out(x, down, up):
  """By descent: a positive gradient pushes down, a negative one up."""
  value, pull = jax.vjp(lambda x: ste_clip(x, jnp.float32(0), jnp.float32(1)), jnp.float32(x))
  assert value == min(max(x, 0), 1)
  assert pull(jnp.float32(3))[0] == 3 * down
  assert pull(jnp.float32(-3))[0] == -3 * up


class _SoftCounts(GivenCounts):
  """Counts whose masks are numbers, so that a token may be pruned or merged by a part."""

  @nn.compact
  def __call__(self, before, n):
    merged, pruned = (jnp.asarray(float(count)) for count in self.fixed)
    mask = {k: self.variable("arch", k, jnp.ones, (n,)).value for k in ("prune", "merge")}
    return Choice(mask["prune"], mask["merge"], pruned, merged, merged)


MERGED, PRUNED, TOKENS = 20, 30, 37


def _soft_masks():
  ranks = np.arange(TOKENS)
  stays = {"prune": ranks < PRUNED, "merge": ranks < MERGED}
  return {k: jnp.asarray(v, jnp.float32) for k, v in stays.items()}


@functools.cache
def _loss(mask_eps):
  """Returns a loss of the soft masks of one layer; smoothed attention takes them as numbers."""
  spec = small_spec(depth=2)
  layers = [dataclasses.replace(layer, mask_eps=mask_eps) for layer in spec.dense_layers]
  reduce = MaskedPruneMerge(_SoftCounts((MERGED, PRUNED)))
  layers[0] = dataclasses.replace(layers[0], reduce=reduce)
  model, params = build(spec, tuple(layers)), random_params(spec)
  images = random_images(spec, 4)

  @jax.jit
  def loss(masks):
    variables = {"params": params, "arch": {"blocks_0": {"reduce": masks}}}
    return jnp.sum(jnp.sin(model.apply(variables, images)))

  return loss


@pytest.mark.parametrize(
  ("name", "ranks"),
  [
    ("merge", [12, 16, MERGED - 1]),  # kept: were they merged
    ("merge", [MERGED, 25, PRUNED - 1]),  # merged: were they kept
    ("prune", [MERGED, 25, PRUNED - 1]),  # merged: were they pruned
    ("prune", [PRUNED, 33, TOKENS - 1]),  # pruned: were they merged
  ],
)
def test_the_gradient_of_a_token_is_the_effect_of_a_part_of_it(name, ranks):
  """By finite differences of a model in which tokens are kept, merged or pruned by a part."""
  masks, step, soft = _soft_masks(), 0.01, _loss(1e-9)
  gradient = jax.jit(jax.grad(_loss(0.0)))(masks)[name]
  for rank in ranks:
    more, less = (soft({**masks, name: masks[name].at[rank].add(x)}) for x in (step, -step))
    expected = float(more - less) / (2 * step)
    np.testing.assert_allclose(gradient[rank], expected, rtol=1e-2, atol=2e-3)
  assert np.abs(gradient[np.array(ranks)]).max() > 0.1
