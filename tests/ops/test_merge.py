"""Matching and merging against plain NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcomp_jax.ops import merge


def test_the_best_of_equals_is_the_first():
  scores = np.random.default_rng(0).integers(0, 4, (3, 7, 5)).astype(np.float32)
  scores[1, 2] = -np.inf
  place, largest = merge.best(jnp.asarray(scores))
  np.testing.assert_array_equal(place, scores.argmax(axis=-1))
  np.testing.assert_array_equal(largest, scores.max(axis=-1))


def test_merging_by_size_is_a_weighted_mean():
  rng = np.random.default_rng(1)
  x, joining = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4, 3))
  size, joining_size = rng.integers(1, 5, (2, 5)), rng.integers(1, 5, (2, 4))
  receiver = rng.integers(0, 5, (2, 4))
  total, sizes = x * size[..., None], size.copy()
  for b, j in np.ndindex(2, 4):
    total[b, receiver[b, j]] += joining_size[b, j] * joining[b, j]
    sizes[b, receiver[b, j]] += joining_size[b, j]
  pairs = (x, joining), (size, joining_size)
  arrays = (jnp.asarray(np.concatenate(pair, axis=1), jnp.float32) for pair in pairs)
  found = merge.merge_weighted(*arrays, jnp.asarray(receiver, jnp.int32))
  np.testing.assert_allclose(found[0], total / sizes[..., None], atol=1e-5)
  np.testing.assert_allclose(found[1], sizes, atol=1e-5)


@pytest.mark.parametrize(("n", "num_prefix"), [(12, 1), (13, 1), (12, 2), (13, 2), (14, 5)])
def test_bipartite_matching(n, num_prefix):
  """Each even token's most similar odd one; the most similar pairs join; the prefix stays."""
  metric = np.random.default_rng(n + num_prefix).normal(size=(n, 6)).astype(np.float32)
  remove = (n - num_prefix) // 2 - 1
  unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
  odd = [j for j in range(1, n, 2) if j >= num_prefix]
  best = {
    i: max(odd, key=lambda j, i=i: unit[i] @ unit[j]) for i in range(0, n, 2) if i >= num_prefix
  }
  joining = sorted(best, key=lambda i: -unit[i] @ unit[best[i]])[:remove]
  match = jax.jit(merge.bipartite_match, static_argnums=(1, 2))
  order, receiver = match(jnp.asarray(metric)[None], remove, num_prefix)
  kept = [i for i in best if i not in joining]
  assert order[0].tolist() == [*range(num_prefix), *kept, *odd, *joining]
  assert order[0][receiver[0]].tolist() == [best[i] for i in joining]
