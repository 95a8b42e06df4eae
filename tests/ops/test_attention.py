"""Attention in all its forms against the softmax that it stands for, and what GPUs would run."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests import models
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import attention

B, H, N, D = 2, 3, 11, 8


@pytest.fixture(params=[D, D - 5, D + 9], ids=["even", "narrow_values", "wide_values"])
def operands(request):
  rng = np.random.default_rng(0)
  q, k, v, grad = (rng.normal(0, 1, (B, H, N, d)) for d in (D, D, request.param, request.param))
  log_size = np.log(rng.integers(1, 9, (B, N)))
  keep = (rng.random((B, N)) < 0.6).astype(float)
  keep[:, 0] = 1
  return {"q": q, "k": k, "v": v, "log_size": log_size, "keep": keep}, grad


def _value_and_gradients(function, operands, grad, dtype):
  @jax.jit
  def both(arguments, grad):
    out, pull = jax.vjp(lambda a: function(**a), arguments)
    return {"out": out, **pull(grad)[0]}

  arguments = {name: jnp.asarray(x, dtype) for name, x in operands.items()}
  return both(arguments, jnp.asarray(grad, dtype))


def _attend(q, k, v, log_size, keep=None):
  return attention.attend(q, k, v, 0.3, log_size, keep)


def _definition(q, k, v, log_size):
  logits = 0.3 * jnp.einsum("bhqk,bhnk->bhqn", q, k) + log_size[:, None, None]
  return jnp.einsum("bhqn,bhnk->bhqk", jax.nn.softmax(logits, axis=-1), v)


def test_proportional_attention_is_a_softmax_with_a_bias(operands):
  del operands[0]["keep"]
  with jax.enable_x64(True):
    found, right = (_value_and_gradients(f, *operands, "float64") for f in (_attend, _definition))
    for name, value in right.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_gradient_of_masked_attention_is_that_of_its_formula(operands, dtype, tolerance):
  def formula(q, k, v, log_size, keep):
    return attention._masked(q, k, v, 0.3, log_size, keep, 0.0)

  with jax.enable_x64(True):
    found = _value_and_gradients(_attend, *operands, dtype)
    right = _value_and_gradients(formula, *operands, "float64")
    for name, value in right.items():
      scale = np.abs(value).max()
      assert found[name].dtype == dtype
      np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


def test_channels_stand_for_a_bias(operands, monkeypatch):
  """What is handed to cuDNN gives the same values, to the accuracy of half precision."""

  def dot_product_attention(q, k, v, scale, implementation):
    assert implementation == "cudnn" and q.shape[-1] % 8 == 0 and q.shape[1] == N
    assert q.shape == k.shape == v.shape
    logits = scale * jnp.einsum("bqhk,bnhk->bhqn", *(x.astype("float32") for x in (q, k)))
    return jnp.einsum("bhqn,bnhk->bqhk", jax.nn.softmax(logits, axis=-1), v.astype("float32"))

  monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
  q, k, v, log_size, _ = (jnp.asarray(x, "float32") for x in operands[0].values())
  half = [x.astype("bfloat16") for x in (q, k, v)]
  found = attention.attend(*half, 0.3, log_size * 3, form="cudnn")
  right = _definition(*(x.astype("float32") for x in half), log_size * 3)
  np.testing.assert_allclose(found, right, rtol=0, atol=2e-3 * np.abs(right).max())


def test_on_a_gpu_no_attention_map_is_left_outside_of_the_kernel(monkeypatch):
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention, "_on_cuda", lambda: True)
  spec = models.small_spec(dtype="bfloat16")
  reduced = dataclasses.replace(spec.dense_layers[0], reduce=PruneMerge(34, 31))
  cut = dataclasses.replace(reduced, head_dim=5, value_dim=9)
  layers = (reduced, cut, *spec.dense_layers[2:])
  model = ViT(spec, layers)
  params = models.random_params(models.small_spec(), layers=layers)
  kernel = jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")
  export = functools.partial(jax.export.export, disabled_checks=[kernel])
  shape = jax.ShapeDtypeStruct((2, *spec.image_size, 3), jnp.float32)
  forward = jax.jit(lambda x: model.apply({"params": params}, x))
  with jax.numpy_dtype_promotion("standard"):  # Flax mixes float32 into half precision
    text = {
      platform: export(forward, platforms=[platform])(shape).mlir_module()
      for platform in ("cuda", "tpu", "cpu")
    }
  maps = [re.findall(rf"tensor<2x{spec.num_heads}x(\d+)x\1x", t) for t in text.values()]
  assert not maps[0] and maps[1] and maps[2]
  assert text["cuda"].count("fmhaSoftmax") == spec.depth and "fmha" not in text["tpu"]


def test_cudnn_needs_half_precision(tmp_path):
  config = {"model": {"variant": "vit_mini_patch3_30", "attention": "cudnn"}}
  with pytest.raises(vc.UserError, match="half precision only; set config.model.dtype=bfloat16"):
    vc.run_stage("evaluate", config | {"data": {"name": "bundled", "pad": 1}}, workdir=tmp_path)
