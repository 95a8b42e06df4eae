"""A slimmed network with equal widths is the same in timm.

`timm_slimmed.npz` holds a dense network's weights (`dense/…`), what `rescale` made of the slimmed
one (`timm/…`), images, and the logits of timm 1.0.31 with PyTorch 2.13 after `load_state_dict`
without a missing or an unexpected tensor:

    class Narrow(timm.layers.Attention):
      __init__ = functools.partialmethod(timm.layers.Attention.__init__, attn_head_dim=5)

    VisionTransformer(img_size=24, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=3,
                      mlp_ratio=1.25, attn_layer=Narrow)
"""

import dataclasses
import pathlib

import jax
import numpy as np

from tests.models import forward, small_spec
from vitcomp_jax.models.slicing import LayerIndex, slice_params
from vitcomp_jax.plans import PlanLayer
from vitcomp_jax.weights import timm, timm_slimmed

ARRAYS = dict(np.load(pathlib.Path(__file__).with_name("timm_slimmed.npz")))
INDICES = (
  LayerIndex(((0, 1, 2, 3, 7), (16, 18, 20, 22, 23), (24, 25, 29, 30, 31)), tuple(range(40))),
  LayerIndex(((8, 9, 10, 11, 15), (16, 17, 20, 21, 23), (3, 4, 5, 6, 7)), tuple(range(24, 64))),
)


def named(prefix):
  return {k.removeprefix(prefix): v for k, v in ARRAYS.items() if k.startswith(prefix)}


def test_timm_gives_the_same_logits():
  spec = small_spec(num_heads=4, depth=2)
  params = slice_params(timm.to_flax(named("dense/")), INDICES)
  layers = tuple(PlanLayer(index).apply_to(spec.dense_layers[0]) for index in INDICES)
  logits = forward(spec, layers, {"params": params}, ARRAYS["images"]).logits
  np.testing.assert_allclose(logits, ARRAYS["logits"], rtol=0, atol=2e-5)

  assert timm_slimmed.arguments(layers, spec.width) == {
    "num_heads": 3,
    "mlp_ratio": 1.25,
    "attn_head_dim": 5,
  }
  written = timm.to_timm(timm_slimmed.rescale(params, head_dim=8, slimmed_head_dim=5))
  jax.tree.map(np.testing.assert_array_equal, written, named("timm/"))


def test_other_widths_are_not_for_timm():
  layer = PlanLayer(INDICES[0]).apply_to(small_spec(num_heads=4).dense_layers[0])
  assert timm_slimmed.arguments((layer, layer), 32) is not None
  for field in ("num_heads", "head_dim", "mlp_dim"):
    narrow = dataclasses.replace(layer, **{field: getattr(layer, field) - 1})
    assert timm_slimmed.arguments((layer, narrow), 32) is None
  assert timm_slimmed.arguments((dataclasses.replace(layer, value_dim=4),), 32) is None


def test_timm_counts_the_same_hidden_units():
  for mlp_dim in range(1, 400):
    layer = dataclasses.replace(small_spec().dense_layers[0], mlp_dim=mlp_dim)
    assert int(48 * timm_slimmed.arguments((layer,), 48)["mlp_ratio"]) == mlp_dim
