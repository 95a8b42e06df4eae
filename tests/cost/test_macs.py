"""The counter against published numbers, and against the products in the traced model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core as jax_core

from tools import timm_table
from vitcomp_jax.cost import macs
from vitcomp_jax.cost.cost_models import MACS
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.models.vit import ViT

SMALL = dict(image_size=(32, 32), patch_size=8, width=24, depth=4, num_heads=3, mlp_dim=96)


def small_spec(variant, **changes):
  return dataclasses.replace(get_spec(variant), **SMALL | {"num_classes": 10} | changes)


@pytest.mark.parametrize(
  ("variant", "gmacs"),
  [
    ("deit_tiny_patch16_224", 1.253830656),
    ("deit_small_patch16_224", 4.599177216),
    ("deit_base_patch16_224", 17.564418048),
    ("vit_base_patch16_224.mae", 17.564418048),
    ("vit_large_patch16_224.mae", 61.555499008),
    ("vit_huge_patch14_224.mae", 167.29586176),
  ],
)
def test_dense(variant, gmacs):
  """N·C·3P² + 1000·C + layers·(12·N·C² + 2·N²·C), as in the paper."""
  spec = get_spec(variant)
  assert macs.static_macs(spec, spec.dense_layers) / 1e9 == pytest.approx(gmacs, rel=1e-12)


MODELS = timm_table.bundled()[0]["models"]
STRUCTURES = [names[0] for names in timm_table.structures(MODELS)]


# Every sixth structure in the quick run.
@pytest.mark.parametrize(
  "variant",
  [pytest.param(v, marks=[] if i % 6 == 0 else pytest.mark.slow) for i, v in enumerate(STRUCTURES)]
  + ["vit_base_patch16_224.mae"],
)
def test_dense_is_the_products_of_the_traced_model(variant):
  spec = small_spec(variant, depth=2)
  assert macs.static_macs(spec, spec.dense_layers) == traced(spec, spec.dense_layers) + embed(spec)


@pytest.mark.parametrize(
  "changes",
  [
    dict(pool="cls_mean"),
    dict(in_chans=5),
    dict(num_classes=0),
    dict(pool="map", pool_mlp_dim=40, pool_heads=2, pool_prefix=True),
    dict(mlp="glu", relative_bias="shared", positions="none"),
  ],
)
def test_dense_of_what_timm_has_not_is_the_products_of_the_traced_model(changes):
  spec = dataclasses.replace(small_spec("deit_tiny_patch16_224"), **changes)
  assert macs.static_macs(spec, spec.dense_layers) == traced(spec, spec.dense_layers) + embed(spec)


@pytest.mark.parametrize("variant", ["deit_tiny_patch16_224", "vit_base_patch16_224.mae"])
def test_reduced_is_the_products_of_the_traced_model(variant):
  spec = small_spec(variant)
  keeps = [(17, 17), (15, 11), (11, 11), (9, 6)]
  layers = tuple(
    dataclasses.replace(layer, reduce=PruneMerge(*keep))
    for layer, keep in zip(spec.dense_layers, keeps, strict=True)
  )
  merging = 0
  for pruned, merged in keeps:
    # Similarities with receivers (CLS is none), sums of joining tokens, and of their sizes.
    joining = pruned - merged
    merging += joining * ((merged - 1) * spec.width + merged * spec.width + merged)
  expected = traced(spec, layers) + embed(spec) - merging
  assert macs.static_macs(spec, layers) == expected


@pytest.mark.parametrize("variant", ["deit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_other_widths_are_the_products_of_the_traced_model(variant):
  spec = small_spec(variant, width=48, depth=2)
  rotated = ((1, 0), (4, 6), (9, 8)) if spec.rotary else None
  cut = dict(head_dim=4, value_dim=7, mlp_dim=50, rotated=rotated)
  layers = (dataclasses.replace(spec.dense_layers[0], **cut), spec.dense_layers[1])
  assert macs.static_macs(spec, layers) == traced(spec, layers) + embed(spec)


def test_widths_of_a_search_are_traced():
  spec = small_spec("deit_tiny_patch16_224")
  layers = tuple(
    dataclasses.replace(layer, head_dim=8 - i, value_dim=8 - 2 * i, mlp_dim=96 - 9 * i)
    for i, layer in enumerate(spec.dense_layers)
  )
  counts = [(17, 15), (15, 11), (11, 11), (9, 6)]
  asked = [layer.widths for layer in layers]
  assert macs.macs(spec, spec.dense_layers, counts, asked) == macs.macs(spec, layers, counts)

  @jax.jit
  def spent(counts, widths):
    return MACS.count(spec, spec.dense_layers, counts, widths)

  floats = jax.tree.map(jnp.float32, (counts, asked))
  assert float(spent(*floats)) == pytest.approx(macs.macs(spec, layers, counts), rel=1e-6)
  gradient = jax.grad(spent, argnums=1)(*floats)[2]
  inner = 11 * 2 * spec.width + 11 * 11
  assert tuple(map(float, gradient)) == (inner, inner, 11 * 2 * spec.width)


def learnt_angles(spec):
  """What the model does once for all images: angles of rotary positions, from their frequencies."""
  if spec.rotary is None or spec.rotary.kind != "mixed":
    return 0
  return spec.depth * 2 * spec.num_patches * spec.width // 2


def embed(spec):
  """What the rule counts and the model does not do: the embedding of the prefix tokens."""
  return spec.num_prefix * spec.width * spec.in_chans * spec.patch_size**2


def traced(spec, layers):
  """Multiply-accumulates of one image's matrix products, but for importances and learnt angles."""
  model = ViT(spec, layers)
  images = jax.ShapeDtypeStruct((1, *spec.image_size, spec.in_chans), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  jaxpr = jax.make_jaxpr(model.apply)(variables, images)
  counts = macs.static_counts(spec, layers)
  cls_rows = sum(
    n * layer.num_heads * layer.head_dim
    for layer, (n, after) in zip(layers, counts, strict=True)
    if after < n
  )
  return products(jaxpr.jaxpr) - cls_rows - learnt_angles(spec)


def products(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    for inner in jax_core.jaxprs_in_params(equation.params):
      total += products(inner)
    assert equation.primitive.name != "conv_general_dilated"
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += depth * math.prod(equation.outvars[0].aval.shape)
  return total
