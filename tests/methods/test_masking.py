"""The gradient that a count of tokens has: that of one token more in its own layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcomp_jax.methods.diffrate.counts import LearntCounts
from vitcomp_jax.methods.diffrate.masking import MaskedPruneMerge
from vitcomp_jax.methods.proxy import learnt_count
from vitcomp_jax.models.tokens import AttentionStats, Tokens

PATCHES, KEPT = 8, 4


def _tokens(values, keep):
  """Tokens whose CLS attention falls with the values of their keys, one head of one channel."""
  x = jnp.asarray(values, jnp.float32)[None, :, None]
  tokens = Tokens.begin(x, 1).replace(keep=jnp.asarray(keep)[None], num_kept=jnp.float32(1 + KEPT))
  q = jnp.ones((1, 1, PATCHES + 1, 1))
  return tokens, AttentionStats(q, x[:, None], x[:, None], None, tokens.keep, 1.0)


@pytest.mark.parametrize(("value", "passes"), [(9.0, 1.0), (3.5, 1.0), (2.5, 0.0), (0.5, 0.0)])
def test_a_dropped_token_passes_where_it_would_have_stayed(value, passes):
  """Of the four patches that enter, of values 4, 3, 2 and 1, the first two stay."""
  values = [0.0, 4.0, 3.0, 2.0, 1.0, value, 0.1, 0.1, 0.1]
  reducer = MaskedPruneMerge(LearntCounts(PATCHES, 1, "prune"))
  arch = {"merge": jnp.float32(2 / PATCHES)}

  def kept(keep):
    tokens, stats = _tokens(values, keep)
    # The mask itself, not the attention that it changes, is what is differentiated.
    stats = stats.replace(keep=jax.lax.stop_gradient(stats.keep))
    return jnp.sum(reducer.apply({"arch": arch}, tokens, stats).keep)

  keep = np.array([1.0] * (1 + KEPT) + [0.0] * (PATCHES - KEPT), np.float32)
  assert float(kept(keep)) == 3
  slope = jax.grad(kept)(keep)
  np.testing.assert_array_equal(slope[:6], [1, 1, 1, 0, 0, passes])
  np.testing.assert_array_equal(slope[6:], 0)


def test_pruning_alone_has_the_gradient_of_one_mask():
  values = jnp.arange(1.0, PATCHES + 2)
  before = jnp.float32(1 + PATCHES)

  def of_the_layer(share):
    counts = LearntCounts(PATCHES, 1, "prune")
    choice = counts.apply({"arch": {"merge": share}}, before, PATCHES + 1)
    return jnp.sum(values * choice.prune * choice.merge)

  def of_one_mask(share):
    mask, _ = learnt_count(share, PATCHES, jnp.float32(2), before, 1, PATCHES + 1)
    return jnp.sum(values * mask)

  share = jnp.float32(0.4)
  assert float(jax.grad(of_the_layer)(share)) == float(jax.grad(of_one_mask)(share)) > 0
