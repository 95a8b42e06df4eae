"""Importance metrics: the scores by which reducers rank tokens."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vitcomp_jax.models.tokens import AttentionStats, Tokens
from vitcomp_jax.ops import importance

Importance = Callable[[AttentionStats, Tokens], Array]


def cls_attention(stats: AttentionStats, tokens: Tokens) -> Float[Array, "b n"]:
  """Computes mean_h softmax(q_cls k / sqrt(d) + log s): the attention of CLS to each token.

  References:
    Liang et al., `EViT <https://arxiv.org/abs/2202.07800>`_, 2022, Eq. 2 and 3;
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, Sec. 3.2.
  """
  del tokens
  q, bias = stats.q[:, :, 0], None if stats.bias is None else stats.bias[:, :, 0]
  return importance.cls_attention(q, stats.k, stats.scale, stats.log_size, stats.keep, bias)


def pool_query_attention(stats: AttentionStats, tokens: Tokens) -> Float[Array, "b n"]:
  """Computes mean_h softmax(q k(norm(x)) / sqrt(d) + log s) for the query q of a pooling head.

  This is the attention that the head would pay to each token if this layer were the last: k
  projects the normalised tokens after this layer's attention to the head's keys. This metric is
  this project's own.
  """
  assert tokens.probe is not None, "pool_query needs a pooling head"
  del stats
  return importance.probe_attention(tokens.x, tokens.probe, tokens.size, tokens.keep)


def mean_attention(stats: AttentionStats, tokens: Tokens) -> Float[Array, "b n"]:
  """Computes mean_h mean_i softmax(q_i k / sqrt(d) + log s): the attention each token receives.

  In a search, the mean is over the kept tokens i only.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, their code for CAFormer.
  """
  del tokens
  return _mean_attention(stats, of_all=False)


def mean_attention_of_all(stats: AttentionStats, tokens: Tokens) -> Float[Array, "b n"]:
  """Computes `mean_attention` over all tokens, including dropped ones in a search.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023, their code for CAFormer.
  """
  del tokens
  return _mean_attention(stats, of_all=True)


def _mean_attention(stats: AttentionStats, of_all: bool) -> Array:
  q, k = stats.q, stats.k
  return importance.mean_attention(
    q, k, stats.scale, stats.log_size, stats.keep, of_all, stats.bias
  )


def value_norm(stats: AttentionStats, tokens: Tokens) -> Float[Array, "b n"]:
  """Computes |v|, the norm of each token's values over all heads. This project's own metric."""
  del tokens
  return importance.value_norm(stats.v, stats.keep)


def random(stats: AttentionStats, tokens: Tokens) -> Float[Array, "b n"]:
  """Returns random scores, the same for every image and call, as a baseline."""
  del tokens
  b, _, n, _ = stats.k.shape
  # Every token count gets a prefix of the same numbers, so that masking and removing agree.
  score = jnp.asarray(np.random.default_rng(0).random(n, np.float32))
  return importance.last_if_dropped(jnp.tile(score, (b, 1)), stats.keep)


# Each maps the statistics of an attention and the tokens after it to scores, f[b n], which are
# negative where a token is masked. `ViTSpec.importance` prefers the first that a model supports.
IMPORTANCES: dict[str, Importance] = {
  "cls": cls_attention,
  "pool_query": pool_query_attention,
  "mean_attention": mean_attention,
  "mean_attention_of_all": mean_attention_of_all,
  "value_norm": value_norm,
  "random": random,
}
