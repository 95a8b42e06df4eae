"""A plan's program for CUDA and TPU, read as text: no device is needed to see what it computes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

import vitcomp_jax as vc
from tests import models
from vitcomp_jax import api
from vitcomp_jax.methods.diffrate import PruneMerge
from vitcomp_jax.models.vit import ViT
from vitcomp_jax.ops import attention
from vitcomp_jax.weights.loading import abstract_params

BATCH = 2
SPEC = vc.get_spec("deit_small_patch16_224", dtype="bfloat16")
LAYERS = vc.load_plan("diffrate/deit_small@2.9").layers_for(SPEC)
# DeiT-S's weights [a b] by their sides.
WIDTHS = {SPEC.width, 3 * SPEC.width, SPEC.mlp_dim, SPEC.patch_size**2 * 3, SPEC.num_classes}


@functools.cache
def lowered(platform: str, form: str) -> str:
  """Returns the program of DeiT-S under its published plan, with bfloat16 weights and images."""
  model = ViT(dataclasses.replace(SPEC, attention=form), LAYERS)

  def half(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  forward = jax.jit(lambda params, images: model.apply({"params": params}, images))
  with jax.numpy_dtype_promotion("standard"):  # Flax mixes float32 into half precision
    params = jax.tree.map(lambda array: half(array.shape), abstract_params(model))
    traced = forward.trace(params, half((BATCH, *SPEC.image_shape)))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture(params=["cuda", "tpu"])
def program(request, monkeypatch):
  """The platform's name and the program that `auto` or its own form gives there."""
  if request.param == "tpu":
    return "tpu", lowered("tpu", "auto")
  monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention, "_on_cuda", lambda: True)
  return "cuda", lowered("cuda", "auto")


def lines(text: str, operation: str) -> list[str]:
  """Returns the lines of an operation."""
  return [line for line in text.splitlines() if re.search(rf"= \"?{operation}\b", line)]


def shapes(line: str) -> list[tuple[int, ...]]:
  """Returns the shapes of a line's types, operands and results alike."""
  found = re.findall(r"tensor<([0-9x]*)x\w+>", line.split(" : ")[-1])
  return [tuple(map(int, dims.split("x"))) for dims in found if dims]


def entering() -> list[int]:
  """Returns the tokens that enter each layer."""
  counts = [SPEC.num_tokens]
  for layer in LAYERS[:-1]:
    counts.append(layer.reduce.count(counts[-1]))
  return counts


def test_maps_of_attention_exist_only_inside_of_the_kernel(program):
  platform, text = program
  # Softmax is in float32; in bfloat16, 64 tokens of 64 channels would look like a map too.
  maps = {int(n) for n in re.findall(rf"tensor<{BATCH}x{SPEC.num_heads}x(\d+)x\1xf32>", text)}
  assert maps == (set() if platform == "cuda" else set(entering()))
  kernels = [line for line in lines(text, "stablehlo.custom_call") if "fmhaSoftmax" in line]
  assert len(kernels) == (SPEC.depth if platform == "cuda" else 0)
  counts = [shapes(line)[0][1] for line in kernels]
  assert counts == (entering() if platform == "cuda" else [])


def test_gathers_take_tokens_and_their_sizes(program):
  """Nothing is gathered to follow patches, as logits do not need it."""
  _, text = program
  pruned = [min(n, layer.reduce.prune_keep) for n, layer in zip(entering(), LAYERS, strict=True)]
  left = [layer.reduce.count(n) for n, layer in zip(entering(), LAYERS, strict=True)]
  found = {shapes(line)[-1] for line in lines(text, "stablehlo.gather")}
  reduced = [i for i in range(SPEC.depth) if left[i] < entering()[i]]
  first_merge = next(i for i in reduced if left[i] < pruned[i])
  # The sizes of the last layer are not read.
  sizes = {(BATCH, pruned[i]) for i in reduced if first_merge < i < SPEC.depth - 1}
  assert found == sizes | {(BATCH, pruned[i], SPEC.width) for i in reduced}
  assert len(lines(text, "chlo.top_k")) == len(reduced)
  assert not lines(text, "stablehlo.scatter") and not lines(text, "stablehlo.sort")


def test_weights_are_used_as_they_lie(program):
  _, text = program
  products = [line for line in lines(text, "stablehlo.dot_general") if _of_weights(line)]
  # The patch embedding, four projections per layer, the classifier.
  assert len(products) == 2 + 4 * SPEC.depth
  for line in products:
    assert re.search(r"contracting_dims = \[\d\] x \[0\]", line) and "f32" not in line
  for operation in ("transpose", "gather", "concatenate", "convert"):
    assert not [line for line in lines(text, f"stablehlo.{operation}") if _of_weights(line)]


def _of_weights(line: str) -> bool:
  return any(len(shape) == 2 and set(shape) <= WIDTHS for shape in shapes(line))


def test_nothing_calls_the_host(program):
  platform, text = program
  calls = set(re.findall(r"custom_call @(\S+?)\(", text))
  assert calls == ({"__cudnn$fmhaSoftmax"} if platform == "cuda" else set())
  assert not re.search(r"stablehlo\.(infeed|outfeed|send|recv)|callback|f64", text)


def test_a_plan_and_a_batch_compile_once():
  spec = models.small_spec(depth=1)
  params, before = models.random_params(spec), api._apply._cache_size()
  for kept in (9, 5):
    for batch in (1, 3):
      for _ in range(2):  # made anew, an equal plan is the same program
        layer = dataclasses.replace(spec.dense_layers[0], reduce=PruneMerge(kept, kept))
        vc.apply(ViT(spec, (layer,)), params, jnp.zeros((batch, *spec.image_shape)))
  assert api._apply._cache_size() == before + 4
