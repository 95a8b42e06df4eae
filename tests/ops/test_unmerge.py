"""Tokens go back to the patches that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import forward, random_images, random_params, small_spec
from vitcomp_jax import macs
from vitcomp_jax.ops.select import unmerge
from vitcomp_jax.schedules import SCHEDULES, within


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_patch_gets_the_token_that_it_became_part_of(name):
  spec = small_spec()
  layers = within(name, spec, 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9)
  out = forward(
    spec, layers, {"params": random_params(spec, layers=layers)}, random_images(spec, 3)
  )
  tokens = out.tokens
  found = np.asarray(unmerge(tokens.x, tokens.source, fill=-7.0))
  assert found.shape == (3, spec.num_patches, spec.width)
  for b, p in np.ndindex(3, spec.num_patches):
    token = int(tokens.source[b, p])
    expected = np.full(spec.width, -7.0) if token < 0 else np.asarray(tokens.x[b, token])
    np.testing.assert_array_equal(found[b, p], expected)


def test_nothing_removed_is_the_identity():
  x = jnp.arange(24.0).reshape(2, 4, 3)
  source = jnp.tile(jnp.arange(1, 4), (2, 1))
  np.testing.assert_array_equal(unmerge(x, source), x[:, 1:])
