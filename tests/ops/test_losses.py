"""The losses equal NumPy's, for every shape and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcomp_jax.ops import losses


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape)


def log_softmax(x):
  return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_its_definition(smoothing):
  logits, labels = normal(0, (5, 7)), np.array([0, 6, 3, 3, 1])
  target = smoothing / 7 + (1 - smoothing) * np.eye(7)[labels]
  want = -np.mean(np.sum(target * log_softmax(logits), axis=1))
  got = losses.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_logit_divergence_equals_its_definition():
  logits, teacher = normal(0, (5, 7)), normal(1, (5, 7))
  p, q = (np.exp(log_softmax(x)) for x in (teacher, logits))
  want = np.mean(np.sum(p * np.log(p / q), axis=1))
  got = losses.logit_divergence(jnp.asarray(logits, jnp.float32), jnp.asarray(teacher, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 8)])
def test_feature_divergence_equals_a_loop(shape):
  features, teacher = normal(0, shape), normal(1, shape)
  pairs = zip(features, teacher, strict=True)
  want = np.mean([np.sum((f - t) ** 2) / np.sum(t**2) for f, t in pairs])
  arrays = [jnp.asarray(x, jnp.float32) for x in (features, teacher)]
  got = losses.feature_divergence(*arrays)
  assert got.shape == ()
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert losses.feature_divergence(arrays[1], arrays[1]) == 0


@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 8)])
def test_cosine_equals_a_loop(shape):
  features, teacher = normal(0, shape), normal(1, shape)
  pairs = zip(features, teacher, strict=True)
  want = np.mean([np.sum(f * t) / np.sqrt(np.sum(f**2) * np.sum(t**2)) for f, t in pairs])
  got = losses.cosine(*(jnp.asarray(x, jnp.float32) for x in (features, teacher)))
  np.testing.assert_allclose(got, want, rtol=1e-5)


DIVERGENCES = [losses.logit_divergence, losses.feature_divergence, losses.cosine]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
  ("dtype", "computed"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_divergences_keep_float32_at_least(divergence, dtype, computed):
  with jax.enable_x64(True):
    a, b = (jnp.asarray(normal(seed, (5, 7)), dtype) for seed in (0, 1))
    got = divergence(a, b)
    assert got.dtype == computed
    assert got == divergence(a.astype(computed), b.astype(computed))
