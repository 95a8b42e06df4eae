"""Layers with a backward pass of their own equal what autodiff makes of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcomp_jax.models.layers import LayerNorm
from vitcomp_jax.ops.activations import gelu


def _value_and_gradients(function, *arguments):
  @jax.jit
  def both(*arguments):
    out, pull = jax.vjp(function, *arguments)
    return out, pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

  return both(*arguments)


def _check_equal(found, right, tolerance):
  def close(a, b):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

  jax.tree.map(close, found, right)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 5e-3)]
)
@pytest.mark.parametrize("shape", [(3, 5, 16), (3, 16)])
def test_layer_norm_is_its_definition(shape, dtype, tolerance):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    wide = "float32" if dtype == "bfloat16" else dtype
    x = jnp.asarray(rng.normal(3, 2, shape), dtype)
    params = {"scale": jnp.asarray(rng.normal(1, 0.3, 16), wide)}
    params["bias"] = jnp.asarray(rng.normal(0, 0.3, 16), wide)

    def definition(params, x):
      x = x.astype(wide)
      mean, variance = (f(x, axis=-1, keepdims=True) for f in (jnp.mean, jnp.var))
      row = (1,) * (x.ndim - 1) + (16,)
      normed = (x - mean) / jnp.sqrt(variance + 1e-6)
      return normed * params["scale"].reshape(row) + params["bias"].reshape(row)

    found = _value_and_gradients(
      lambda params, x: LayerNorm(1e-6).apply({"params": params}, x), params, x
    )
    _check_equal(found, _value_and_gradients(definition, params, x), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6)])
def test_gelu_is_the_exact_one(dtype, tolerance):
  with jax.enable_x64(True):
    x = jnp.linspace(-7, 7, 57, dtype=dtype)
    found = _value_and_gradients(gelu, x)
    _check_equal(
      found, _value_and_gradients(lambda x: jax.nn.gelu(x, approximate=False), x), tolerance
    )
