"""Tokens go back to the patches that they stand for."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import random_images, random_params, small_spec
from vitcomp_jax.cost import macs
from vitcomp_jax.methods.registry import schedules, within
from vitcomp_jax.models.tokens import Tokens
from vitcomp_jax.models.vit import ViT

PREFIXES = {
  "cls": {},
  "none": {"class_token": False, "pool": "map"},
  "five": {"num_registers": 4, "pos_on_prefix": False},
}


@dataclasses.dataclass(frozen=True)
class Spy:
  """A reducer that tells what it was given, and what became of the patches."""

  inner: Any
  seen: Any = dataclasses.field(compare=False)

  def __call__(self, tokens, stats):
    reduced = self.inner(tokens, stats)
    self.seen.append((tokens.x, tokens.source, reduced.source))
    return reduced

  def count(self, n):
    return self.inner.count(n)

  @property
  def importance(self):
    return getattr(self.inner, "importance", None)


def run(spec, layers, params):
  """The tokens after each layer, and what every reduction behind attention saw."""
  seen = []
  spied = tuple(dataclasses.replace(layer, reduce=Spy(layer.reduce, seen)) for layer in layers)

  @jax.jit
  def forward(params, images):
    seen.clear()
    out = ViT(spec, spied).apply({"params": params}, images, method="forward")
    return out, list(seen)

  out, seen = forward(params, random_images(spec, 2))
  return out, jax.device_get(seen)


def _cases():
  """All but DynamicViT; at once, each way in which tokens are removed, and each prefix."""
  at_once = {("uniform", prefix) for prefix in PREFIXES}
  at_once |= {(name, "cls") for name in ("uniform_merge", "tome", "evit")}
  for case in itertools.product(schedules(), PREFIXES):
    if case[0] != "dynamicvit":
      yield pytest.param(*case, marks=() if case in at_once else pytest.mark.slow)


@pytest.mark.parametrize(("name", "prefix"), list(_cases()))
def test_every_patch_shows_its_token_or_its_last_value(name, prefix):
  spec = small_spec(**PREFIXES[prefix])
  layers = within(name, spec, 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9)
  out, seen = run(spec, layers, random_params(spec, noise=0.5, layers=layers))
  expected = np.zeros((2, spec.num_patches, spec.width), np.float32)
  for x, before, after in seen:
    for b, p in np.argwhere((before >= 0) & (after < 0)):
      expected[b, p] = x[b, before[b, p]]
  x, source = np.asarray(out.layers[-1].x), np.asarray(out.layers[-1].source)
  for b, p in np.argwhere(source >= 0):
    expected[b, p] = x[b, source[b, p]]
  np.testing.assert_allclose(vc.unmerge(out.layers[-1]), expected, rtol=0, atol=1e-5)


def test_pruned_patches_are_normed_like_the_others():
  spec = small_spec()
  layers = within("uniform", spec, 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9)
  out, _ = run(spec, layers, random_params(spec, noise=0.5, layers=layers))
  assert np.any(np.asarray(out.tokens.source) < 0)
  params = random_params(spec, noise=0.5, layers=layers)["norm"]
  x = np.asarray(vc.unmerge(out.layers[-1]))
  normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  expected = normed * np.asarray(params["scale"]) + np.asarray(params["bias"])
  np.testing.assert_allclose(vc.unmerge(out.tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_nothing_removed_is_the_identity(num_prefix):
  x = jnp.arange(48.0).reshape(2, 8, 3)
  tokens = Tokens.begin(x, num_prefix)
  np.testing.assert_array_equal(vc.unmerge(tokens), x[:, num_prefix:])


def test_dynamicvit_prunes_before_attention():
  spec = small_spec()
  layers = within("dynamicvit", spec, 0.6 * macs.static_macs(spec, spec.dense_layers) / 1e9)
  out, _ = run(spec, layers, random_params(spec, noise=0.5, layers=layers))
  place = next(i for i, layer in enumerate(layers) if layer.select != spec.dense_layers[0].select)
  gone = np.asarray(out.layers[place].source) < 0
  assert gone.any() and out.layers[place - 1].pruned is None
  before, after = (np.asarray(vc.unmerge(out.layers[i])) for i in (place - 1, -1))
  np.testing.assert_allclose(after[gone], before[gone], rtol=0, atol=1e-5)
