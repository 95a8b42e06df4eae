"""The stage visualize draws what the run has, says what it has not, and draws it right."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import TINY, tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.methods.evit import AttentiveSelect
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.plans import save_plan
from vitcomp_jax.reporting import model_plots, run_plots


def _figures(workdir):
  names = {path.stem for path in (workdir / "figures").iterdir()}
  assert {p.name for p in (workdir / "figures").iterdir()} == {
    f"{name}.{kind}" for name in names for kind in ("png", "svg")
  }
  return names


def _images(count):
  return np.random.default_rng(0).integers(256, size=(count, 30, 30, 3), dtype=np.uint8)


@pytest.mark.slow
def test_a_run_with_all_there_is(tmp_path):
  config = tiny_config()
  spec = get_spec(TINY)
  other = tmp_path / "other.json"
  save_plan(vc.make_plan(spec, vc.methods.tome.layers(spec, 3), {"method": "tome"}), other)
  config.budget.fraction = 0.75
  config.visualize.images, config.visualize.plans = 1, (str(other),)
  config.evaluate.baselines = ("uniform",)
  run = tmp_path / "run"
  vc.run_stage("search", config, run)
  vc.run_stage("evaluate", config, run)
  before = _figures(run)
  assert before == {"schedule", "search", "accuracy", "token_maps"}
  page = vc.run_stage("visualize", config, run)
  assert page == run / "report.html"
  assert _figures(run) == before | {"plans", "attention", "token_maps_by_layer"}
  text = page.read_text()
  assert text.count("data:image/svg+xml;base64,") == len(_figures(run))
  absent = text[text.index("Not in this report") :]
  assert "Published figures" in absent and "Widths" in absent and "Search" not in absent

  page.write_text("kept")
  # A finished stage is not run again.
  assert vc.run_stage("visualize", config, run).read_text() == "kept"


def test_a_run_of_nothing_else(tmp_path):
  config = tiny_config()
  config.visualize.images, config.visualize.layers = 1, (2, 3)
  text = vc.run_stage("visualize", config, tmp_path).read_text()
  assert _figures(tmp_path) == {"attention"}
  for absent in (
    "No model was measured",
    "Schedules and token maps:",
    "Accuracy:",
    "Search curves:",
  ):
    assert absent in text


def test_what_does_not_fit_is_refused(tmp_path):
  for key, value, message in (
    ("layers", (4,), "visualize.layers: expected layers from 1 to 3, got 4"),
    ("plans", ("diffrate/deit_small@2.9",), "expected 3 layers"),
  ):
    config = tiny_config()
    config.visualize[key] = value
    with pytest.raises(vc.UserError, match=message):
      vc.run_stage("visualize", config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_attention_is_that_of_a_plain_softmax():
  model, params = vc.load(TINY)
  images = _images(2)
  shares = model_plots._inside(model, params, images)[1][0]
  pixels = normalize(jnp.asarray(images), model.spec.preprocess)
  x = np.asarray(model.apply({"params": params}, pixels, method="embed").x, np.float64)
  block = params["blocks_0"]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.spec.norm_eps)
  x = x * np.asarray(block["norm1"]["scale"]) + np.asarray(block["norm1"]["bias"])
  qkv = x @ np.asarray(block["attn"]["qkv"]["kernel"]) + np.asarray(block["attn"]["qkv"]["bias"])
  q, k, _ = np.split(qkv, 3, axis=-1)
  heads, dims = model.layers[0].num_heads, model.layers[0].head_dim
  expected = np.zeros(shares.shape)
  for i in range(2):
    for h in range(heads):
      part = slice(h * dims, (h + 1) * dims)
      logits = k[i, :, part] @ q[i, 0, part] / np.sqrt(dims)
      weights = np.exp(logits) / np.exp(logits).sum()
      expected[i] += weights[1:] / heads
  np.testing.assert_allclose(shares, expected, rtol=1e-4)


def test_attention_follows_the_patches():
  """A merged token's attention is shared by its patches, and a pruned patch gets none."""
  spec = get_spec(TINY)
  dense = spec.dense_layers[0]
  layers = tuple(
    dataclasses.replace(dense, reduce=PruneMerge(*counts))
    for counts in ((20, 14), (12, 12), (12, 12))
  )
  model, params = ViT(spec, layers), vc.load(TINY)[1]
  sources, shares = model_plots._inside(model, params, _images(2))
  for before, share in zip(sources[:2], shares[1:], strict=True):
    np.testing.assert_array_equal(share < 0, before < 0)
    for source, values in zip(before, share, strict=True):
      assert 0 < values[values > 0].sum() < 1
      for token in set(source[source >= 0]):
        assert len(set(values[source == token].tolist())) == 1
  assert (sources[0] < 0).any() and any(len(set(s)) < 20 for s in sources[0])


def test_counts_say_who_prunes_and_who_merges():
  spec = get_spec(TINY)
  tome = run_plots.kept_counts(spec, vc.methods.tome.layers(spec, 3))
  assert tome == [(26, 23), (23, 20), (20, 17)]
  evit = vc.methods.evit.layers(spec, [1, 0.5, 1])
  assert isinstance(evit[1].reduce, AttentiveSelect)
  assert run_plots.kept_counts(spec, evit) == [(26, 26), (15, 15), (15, 15)]
  models = {"a": vc.methods.tome.layers(spec, 3), "b": evit, "dense": spec.dense_layers}
  assert list(run_plots.schedules_of(spec, {**models, "again": models["a"]})) == ["a", "b"]


def test_published_accuracies():
  found = vc.published_accuracies(vc.get_spec("deit_small_patch16_224"))
  gmacs = vc.load_plan("diffrate/deit_small@2.9").gmacs
  assert found["DiffRate, off the shelf (the authors)"] == [(gmacs, 79.538)]
  [(gmacs, top1)] = found["dense (DeiT's README)"]
  assert top1 == 79.9 and gmacs == pytest.approx(4.6, abs=0.01)
  [(gmacs, top1)] = found["ToMe, trained (ToMe's README)"]
  assert top1 == 79.36 and gmacs == pytest.approx(2.7, abs=0.05)
  assert found["DynamicViT, trained (DynamicViT's README)"] == [(2.9, 79.32)]
  for other in (vc.get_spec("deit_small_patch16_224", 10), vc.get_spec(TINY)):
    assert vc.published_accuracies(other) == {}


def test_layers_at_even_distances():
  assert model_plots.spaced(12, 4) == [3, 6, 9, 12]
  assert model_plots.spaced(3, 4) == [1, 2, 3]
  assert len(model_plots.spaced(32, 14)) == 14 and model_plots.spaced(32, 14)[-1] == 32
