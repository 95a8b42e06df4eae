"""Every method on every family of models: rotary positions, biases, other heads, MLPs and norms."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import forward, random_images, random_params, small_spec
from vitcomp_jax.config import DiffRateOptions, ViTSlimOptions
from vitcomp_jax.cost import macs
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods import DiffRate, evit, tome
from vitcomp_jax.methods.diffrate.reducer import PruneMerge
from vitcomp_jax.methods.vit_slim.search import ViTSlim, deploy, fold, masked_layers
from vitcomp_jax.models.build import build
from vitcomp_jax.models.rotary import Rotary
from vitcomp_jax.models.slicing import slice_params
from vitcomp_jax.plans import parse_plan
from vitcomp_jax.weights.loading import load_params

FAMILIES = {
  "eva02": dict(
    rotary=Rotary(reference=(4, 4)),
    qkv_bias="qv",
    mlp="swiglu",
    mlp_norm=True,
    attn_norm=True,
    activation="silu",
  ),
  "dinov3": dict(
    rotary=Rotary("centred", 100.0, halves=True),
    positions="none",
    num_registers=2,
    layer_scale=True,
    qkv_bias="",
    pool="size_mean",
  ),
  "rope_mixed": dict(rotary=Rotary("mixed", 10.0, columns_first=True), positions="none"),
  "perception": dict(
    rotary=Rotary(reference=(3, 3), offset=1.0, columns_first=True),
    norm_pre=True,
    patch_bias=False,
    pool="map",
    pool_prefix=True,
    pool_heads=4,
  ),
  "beit": dict(
    relative_bias="layer",
    positions="none",
    qkv_bias="qv",
    layer_scale=True,
    pool="size_mean",
    final_norm=False,
    fc_norm=True,
  ),
  "beit_shared": dict(relative_bias="shared", positions="none", qkv_bias="qv"),
  "dinov2_classifier": dict(pool="cls_mean", mlp="glu", activation="silu", layer_scale=True),
  "registers_mean": dict(class_token=False, num_registers=3, pool="size_mean", pos_on_prefix=False),
  "aimv2": dict(
    class_token=False,
    pool="size_mean",
    norm="rms",
    patch_norm=True,
    linear_bias=False,
    qkv_bias="",
    mlp="swiglu",
  ),
  "qk_norm_after": dict(qk_norm=True, norm_after=True),
}


def quickly(*names):
  """All families; but for the named ones they are slow proofs."""
  return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]


@functools.cache
def _family(name):
  spec = small_spec(depth=3, **FAMILIES[name])
  return spec, random_params(spec), random_images(spec, 2)


def _plan(spec):
  """A plan that prunes and merges in every layer."""
  n, made = spec.num_tokens, []
  for layer in spec.dense_layers:
    reduce = PruneMerge(n - 4, n - 9, importance=spec.importance())
    made.append(dataclasses.replace(layer, reduce=reduce))
    n = reduce.count(n)
  return tuple(made)


@pytest.mark.parametrize("name", quickly("eva02", "dinov3", "beit"))
def test_a_search_equals_its_plan(name):
  spec, params, images = _family(name)
  options = DiffRateOptions(compress_first=True, compress_last=True)
  method, layers = DiffRate(spec, 1.0, options), _plan(spec)
  static = forward(spec, layers, {"params": params}, images)
  arch = method.replayed_arch(layers)
  masked = forward(spec, method.replayed_layers(), {"params": params, "arch": arch}, images)
  np.testing.assert_allclose(masked.logits, static.logits, rtol=0, atol=1e-5)
  assert static.tokens.x.shape[1] == macs.static_counts(spec, layers)[-1][1]
  np.testing.assert_allclose(vc.unmerge(masked.tokens), vc.unmerge(static.tokens), atol=1e-4)
  assert vc.unmerge(static.tokens).shape == (2, spec.num_patches, spec.width)


@pytest.mark.parametrize("name", quickly("perception"))
def test_a_search_that_keeps_all_is_the_dense_model(name):
  spec, params, images = _family(name)
  method = DiffRate(spec, 1.0, DiffRateOptions(compress_first=True, compress_last=True))
  keep = PruneMerge(spec.num_tokens, spec.num_tokens, importance=spec.importance())
  layers = tuple(dataclasses.replace(layer, reduce=keep) for layer in spec.dense_layers)
  arch = method.replayed_arch(layers)
  masked = forward(spec, method.replayed_layers(), {"params": params, "arch": arch}, images)
  dense = forward(spec, spec.dense_layers, {"params": params}, images)
  np.testing.assert_allclose(masked.logits, dense.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", quickly("rope_mixed", "beit_shared"))
def test_the_order_of_tokens_does_not_matter(name):
  """Positions follow a token, and one that is fused of others has none."""
  spec, params, images = _family(name)
  model = build(spec, spec.dense_layers)

  def encoded(order):
    tokens = model.apply({"params": params}, images, method="embed")
    tokens = tokens if order is None else tokens.take(order)
    return model.apply({"params": params}, 0, tokens, method="encode").x

  shuffled = np.random.default_rng(0).permutation(np.arange(spec.num_prefix, spec.num_tokens))
  order = np.tile(np.r_[: spec.num_prefix, shuffled], (2, 1))
  moved = jax.jit(lambda: encoded(jnp.asarray(order)))()
  there = jax.jit(lambda: encoded(None))()
  expected = np.take_along_axis(np.asarray(there), order[..., None], axis=1)
  np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", quickly("dinov2_classifier"))
def test_tokens_stand_for_all_patches(name):
  spec, params, images = _family(name)
  for layers in (tome.layers(spec, r=3), evit.layers(spec, [1, 0.5, 0.7])):
    out = forward(spec, layers, {"params": params}, images)
    assert bool(jnp.isfinite(out.logits).all())
    assert out.tokens.x.shape[1] == macs.static_counts(spec, layers)[-1][1]
    assert bool((out.tokens.source >= 0).all())
    if out.tokens.size is not None:
      sizes = np.asarray(out.tokens.size)[:, spec.num_prefix :]
      np.testing.assert_allclose(sizes.sum(axis=1), spec.num_patches, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_equals_the_model(name, tmp_path):
  spec, params, _ = _family(name)
  model = build(spec, _plan(spec))
  vc.export(model, params, tmp_path / "model.onnx")  # which compares both
  assert vc.load_exported(tmp_path / "model.onnx") is not None


CUT = [("dinov3", 8), ("beit", 1), ("aimv2", 1)]
CUT_SLOWLY = [("dinov3", 1), ("rope_mixed", 1), ("rope_mixed", 8), ("perception", 1), ("beit", 8)]
CUT_SLOWLY += [("dinov2_classifier", 1), ("dinov2_classifier", 8), ("aimv2", 8)]


@pytest.mark.parametrize(
  ("name", "tile"), [*CUT, *(pytest.param(*case, marks=pytest.mark.slow) for case in CUT_SLOWLY)]
)
def test_a_slimmed_model_equals_the_masked_one(name, tile):
  spec, params, images = _family(name)
  method = ViTSlim(spec, ViTSlimOptions())
  rng = np.random.default_rng(1)
  arch = jax.tree.map(lambda z: rng.uniform(0, 1, z.shape), method.init())
  masks = method.cut(arch, (0.6, 0.5, 1.0))
  masked = forward(spec, masked_layers(spec, masks), {"params": params}, images)
  layers, indices = deploy(spec, masks, tile)
  small = slice_params(params, indices)
  slimmed = forward(spec, layers, {"params": small}, images)
  np.testing.assert_allclose(slimmed.logits, masked.logits, rtol=0, atol=1e-5)
  plan = parse_plan(json.loads(json.dumps(vc.make_plan(spec, layers, {}, indices).to_json())))
  assert plan.layers_for(spec) == layers


def test_soft_masks_of_rotated_pairs_fold_into_the_weights():
  spec, params, images = _family("dinov3")
  method = ViTSlim(spec, ViTSlimOptions())
  rng = np.random.default_rng(1)
  arch = jax.tree.map(lambda z: jnp.asarray(rng.uniform(0.5, 1, z.shape)), method.init())
  for gates in arch.values():  # the factors of patches have no weights to fold into
    gates["token_gate"]["zeta"] = jnp.full_like(gates["token_gate"]["zeta"], 100.0)
  soft = forward(spec, method.layers(), {"params": params, "arch": arch}, images)
  folded = forward(spec, spec.dense_layers, {"params": fold(spec, params, arch)}, images)
  np.testing.assert_allclose(folded.logits, soft.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("eva02", "attention is normed over all heads; set config.slim.w_attn=0"),
    ("beit_shared", "layers share a bias for each head"),
    ("qk_norm_after", "set config.slim.attn=heads"),
  ],
)
def test_units_that_are_read_together_are_not_cut(name, reason):
  with pytest.raises(UserError, match=reason):
    ViTSlim(_family(name)[0], ViTSlimOptions())


def test_images_of_five_channels():
  spec = small_spec(depth=1, in_chans=5)
  model = build(spec, spec.dense_layers)
  params = load_params(spec, spec.dense_layers, None)
  assert vc.apply(model, params, np.zeros((2, *spec.image_shape), np.float32)).shape == (2, 7)
  with pytest.raises(UserError, match=r"expected floats of shape \[b, 24, 24, 5\]"):
    vc.apply(model, params, np.zeros((2, 24, 24, 3), np.float32))
