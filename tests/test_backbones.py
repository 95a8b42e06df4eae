"""Models without a CLS token, and what tells their important tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import vitcomp_jax as vc
from tests.models import random_images, random_params, small_spec
from tests.stages.test_slim import tiny_config
from vitcomp_jax import predict, strict_json
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.cost import macs
from vitcomp_jax.methods import within
from vitcomp_jax.models.caformer import caformer
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops.importance import probe_attention
from vitcomp_jax.plans import load_plan, make_plan, save_plan
from vitcomp_jax.stages import run_stages

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
  keep, ones = np.ones((2, 9), np.float32), np.ones((2, 9), np.float32)
  keep[0, 3:5] = 0
  params = jax.device_get(params)
  found = probe_attention(*map(jnp.asarray, (x, tokens.probe, size, keep)))
  expected = np.where(keep > 0, pooling_attention(params, x, size, keep), -1)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  found = probe_attention(jnp.asarray(x), tokens.probe)
  np.testing.assert_allclose(found, pooling_attention(params, x, ones, ones), atol=1e-6)


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
    vc.run_stage(stage, config, workdir=tmp_path / "run")
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


KINDS = {
  "clip": {"norm_pre": True, "norm_eps": 1e-5, "activation": "quick_gelu"},
  "siglip": {"class_token": False, "pool": "map", "activation": "gelu_tanh"},
  "dinov2_reg4": {"num_registers": 4, "pos_on_prefix": False, "layer_scale": True},
  "caformer": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_search_to_an_export(kind, tmp_path, monkeypatch, optax_promotion, capsys):
  options = KINDS[kind]
  if options is None:
    spec = caformer("tiny", (96, 96), (1, 1, 3, 3), (8, 8, 32, 32), num_classes=10)
  else:
    spec = small_spec(name="tiny", image_size=(30, 30), patch_size=6, num_classes=10, **options)
  monkeypatch.setitem(VARIANTS, "tiny", spec)
  config = tiny_config()
  config.model.variant, config.data.pad = "tiny", (spec.image_size[0] - 28) // 2
  config.stages = ("search", "evaluate", "export")
  config.budget.fraction = 0.8
  if kind == "caformer":
    # Alike in all of a wide padding, tokens would be equally important; and convolutions are most.
    config.data.name, config.data.pad, config.budget.fraction = "fake", 0, 0.95
  config.evaluate.baselines = ("uniform_merge", "tome", "evit")
  importance = {"clip": "cls", "siglip": "pool_query"}.get(kind, "mean_attention")
  config.search.importance = importance
  run = run_stages(from_config_dict(config), tmp_path / "run", config.stages)
  rows = {
    row["name"]: row["gmacs"] for row in strict_json.read(tmp_path / "run/result.json")["rows"]
  }
  assert set(rows) == {"dense", "diffrate", "uniform_merge", "tome", "evit"}
  assert all(
    rows[name] == pytest.approx(rows["diffrate"], rel=0.05) for name in rows if name != "dense"
  )
  assert {layer.reduce.importance for layer in run.artefacts.layers} == {importance}
  (artefact,) = strict_json.read(tmp_path / "run/export/manifest.json")["artefacts"]
  assert artefact["compared"]["differing"] <= 3
  PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "image.png")
  command = ["predict", "--workdir", str(tmp_path / "run"), "--maps", str(tmp_path / "maps")]
  assert predict.main([*command, str(tmp_path / "image.png")]) == 0
  assert "%" in capsys.readouterr().out
