"""Models without a CLS token, and what tells their important tokens."""

import jax
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import random_images, random_params, small_spec
from vitcomp_jax import macs
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops.attention import probe_attention
from vitcomp_jax.plans import load_plan, make_plan, save_plan
from vitcomp_jax.schedules import within

MAP = small_spec(class_token=False, pool="map")


def pooling_attention(params, x, size, keep):
  """What the head's softmax gives each token, mean over heads: f64[b n]."""
  norm, pool = params["norm"], params["attn_pool"]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  x = x * norm["scale"] + norm["bias"]
  b, n, d = x.shape
  k = (x @ pool["kv"]["kernel"] + pool["kv"]["bias"])[..., :d].reshape(b, n, MAP.num_heads, -1)
  q = (pool["latent"][0, 0] @ pool["q"]["kernel"] + pool["q"]["bias"]).reshape(MAP.num_heads, -1)
  logits = np.einsum("hk,bnhk->bhn", q, k) / np.sqrt(q.shape[1]) + np.log(size)[:, None]
  weights = np.exp(logits) * keep[:, None]
  return (weights / weights.sum(-1, keepdims=True)).mean(axis=1)


def test_the_pooling_heads_query_is_the_heads_own_attention():
  layers = within("uniform", MAP, 0.7 * macs.static_macs(MAP, MAP.dense_layers) / 1e9)
  assert {layer.reduce.importance for layer in layers[1:-1]} == {"pool_query"}
  params = random_params(MAP)
  tokens = ViT(MAP, layers).apply({"params": params}, random_images(MAP, 2), method="embed")
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 9, MAP.width)).astype(np.float32)
  size = rng.integers(1, 5, (2, 9)).astype(np.float32)
  keep = np.ones((2, 9), np.float32)
  keep[0, 3:5] = 0
  expected = pooling_attention(jax.device_get(params), x, size, keep)
  found = np.asarray(probe_attention(x, tokens.probe, size, keep))
  np.testing.assert_allclose(found, np.where(keep > 0, expected, -1), atol=1e-6)
  whole = pooling_attention(jax.device_get(params), x, np.ones_like(size), np.ones_like(keep))
  np.testing.assert_allclose(probe_attention(x, tokens.probe), whole, atol=1e-6)


def test_what_a_model_can_do_by_itself():
  assert small_spec().importance() == "cls"
  assert small_spec(num_registers=4).importance("mean_attention") == "mean_attention"
  assert MAP.importance() == "pool_query"


@pytest.mark.parametrize(
  ("variant", "asked", "lacks"),
  [
    ("vit_base_patch16_siglip_224", "cls", "no CLS token"),
    ("deit_tiny_patch16_224", "pool_query", "no query in its head"),
  ],
)
@pytest.mark.parametrize("stage", ["search", "evaluate"])
def test_an_importance_that_the_model_lacks(variant, asked, lacks, stage, tmp_path):
  config = {
    "model": {"variant": variant},
    "data": {"name": "fake"},
    "budget": {"fraction": 0.5},
    "search": {"importance": asked, "loss": "features"},
    "evaluate": {"baselines": ("uniform",)},
  }
  with pytest.raises(vc.UserError, match=f"config.search.importance: .*{lacks}, got {asked}"):
    getattr(vc, stage)(config, workdir=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_plan_whose_importance_the_model_lacks(tmp_path):
  spec = vc.get_spec("deit_tiny_patch16_224")
  layers = within("uniform", spec, 0.8)
  plan = make_plan(spec, layers, {})
  save_plan(plan, tmp_path / "plan.json")
  text = (tmp_path / "plan.json").read_text()
  text = text.replace('"type": "prune_merge"', '"type": "prune_merge", "importance": "pool_query"')
  (tmp_path / "plan.json").write_text(text)
  with pytest.raises(vc.UserError, match="plan: layer 1: importance: .*no query in its head"):
    load_plan(str(tmp_path / "plan.json")).layers_for(spec)
