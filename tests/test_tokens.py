"""Every field of the tokens follows what is done to the sequence."""

import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from vitcomp_jax.models.tokens import Tokens
from vitcomp_jax.ops import merge

B, P = 2, 9


def begin(num_prefix):
  """Tokens whose values name the patches that they hold."""
  patches = jnp.broadcast_to(jnp.eye(P), (B, P, P))
  x = jnp.concatenate([jnp.zeros((B, num_prefix, P)), patches], axis=1)
  return Tokens.begin(x, num_prefix, size=jnp.ones(x.shape[:2]), track_origin=True)


def draw_order(rng, tokens, count):
  """Other tokens for each image, the prefix in front."""
  prefix, n = tokens.num_prefix, tokens.x.shape[1]
  rows = [rng.permutation(np.arange(prefix, n))[: count - prefix] for _ in range(B)]
  return jnp.asarray(np.concatenate([np.tile(np.arange(prefix), (B, 1)), rows], axis=1), jnp.int32)


def draw_receiver(rng, tokens, start, shape):
  return jnp.asarray(rng.integers(tokens.num_prefix, start, shape), jnp.int32)


def take(rng, tokens):
  return tokens.take(draw_order(rng, tokens, tokens.x.shape[1] - 1))


def sort(rng, tokens):
  return tokens.take(draw_order(rng, tokens, tokens.x.shape[1]))


def fuse(rng, tokens):
  order = draw_order(rng, tokens, tokens.x.shape[1] - 2)
  return tokens.fuse(order, jnp.full(tokens.x.shape[:2], 0.5))


def join(rng, tokens):
  start = tokens.x.shape[1] - 2
  receiver = draw_receiver(rng, tokens, start, (B, 2))
  return tokens.merge(*merge.merge_weighted(tokens.x, tokens.sizes, receiver), receiver)


def check(tokens):
  """Holds the fields to what the values say."""
  x = np.asarray(tokens.x)
  holds = x > 0  # [b n p]
  np.testing.assert_array_equal(
    tokens.source, np.where(holds.any(axis=1), holds.argmax(axis=1), -1)
  )
  patches = holds[:, tokens.num_prefix :].sum(axis=2)
  np.testing.assert_array_equal(tokens.sizes[:, tokens.num_prefix :], patches)
  origin = np.asarray(tokens.origin)
  for b, i in np.argwhere(origin >= 0):
    assert holds[b, i, origin[b, i]]
  assert (origin[:, : tokens.num_prefix] == -1).all()
  shown = np.asarray(vc.unmerge(tokens))  # a pruned patch shows a token that held it
  assert (np.einsum("bpp->bp", shown) > 0).all()
  assert tokens.x.shape[:2] == tokens.sizes.shape == tokens.kept.shape == origin.shape


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize(
  "changes", [(take, join, sort, take), (join, fuse, take), (sort, fuse, join)]
)
def test_all_fields_follow(changes, num_prefix):
  rng = np.random.default_rng(len(changes) + num_prefix)
  tokens = begin(num_prefix)
  check(tokens)
  for change in changes:
    tokens = change(rng, tokens)
    check(tokens)


def test_masking_does_to_patches_what_removing_does():
  """Two tokens are pruned and three merged, once for real and once behind a mask."""
  rng, tokens = np.random.default_rng(0), begin(1)
  n, pruned, merged = P + 1, P - 1, P - 4
  order = draw_order(rng, tokens, n)
  receiver = draw_receiver(rng, tokens, merged, (B, n))
  removed = tokens.take(order[:, :pruned])
  x, size = merge.merge_weighted(removed.x, removed.sizes, receiver[:, merged:pruned])
  removed = removed.merge(x, size, receiver[:, merged:pruned])
  rank = jnp.arange(n)[None]
  keep = jnp.broadcast_to((rank < merged).astype(x.dtype), (B, n))
  masked = tokens.take(order).mask(rank >= pruned, keep, jnp.asarray(merged))
  joins = (rank >= merged) & (rank < pruned)
  places = jnp.where(joins, receiver, rank)
  x = jnp.concatenate([x, masked.x[:, merged:]], axis=1)
  size = jnp.concatenate([size, masked.sizes[:, merged:]], axis=1)
  masked = masked.merge(x, size, places)
  assert masked.x.shape[1] == n and int(masked.num_kept) == merged
  for tokens in (masked, masked.first(merged)):
    np.testing.assert_array_equal(tokens.source, removed.source)
    np.testing.assert_array_equal(vc.unmerge(tokens), vc.unmerge(removed))
    np.testing.assert_array_equal(tokens.origin[:, :merged], removed.origin)
    np.testing.assert_array_equal(tokens.kept[:, :merged], removed.kept)
