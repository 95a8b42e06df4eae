"""Widths without training: orders, rotations, masks, and the narrower network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import forward, random_images, random_params, small_spec
from tests.test_families import FAMILIES
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.widths.calibration import calibrate
from vitcomp_jax.methods.widths.deployment import slimmed
from vitcomp_jax.methods.widths.elimination import importance_order
from vitcomp_jax.methods.widths.factors import factorise
from vitcomp_jax.methods.widths.lists import sorted_lists
from vitcomp_jax.methods.widths.masking import masked_params
from vitcomp_jax.models.build import build

KINDS = {"deit": {}, **FAMILIES}
HEAD_DIM, HIDDEN = 8, 24


def kinds(*quick):
  return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]


@functools.cache
def _measured(name):
  spec = small_spec(depth=2, num_heads=4, mlp_dim=HIDDEN, **KINDS[name])
  params = random_params(spec)
  return spec, params, calibrate(spec, params, [random_images(spec, 4, seed=1)])


@functools.cache
def _factored(name):
  spec, params, moments = _measured(name)
  return spec, params, factorise(spec, params, moments)


def _masks(spec, counts):
  lists = sorted_lists(spec)
  return [
    {k: jnp.asarray(np.arange(lists[k].length) < n, jnp.float32) for k, n in layer.items()}
    for layer in counts
  ]


def _logits(spec, params, images, layers=None):
  return np.asarray(forward(spec, layers or spec.dense_layers, {"params": params}, images).logits)


def _changed(params, layer, part, **values):
  """Returns parameters with others for one part of a layer."""
  block = params[f"blocks_{layer}"]
  return {**params, f"blocks_{layer}": {**block, part: {**block[part], **values}}}


@functools.partial(jax.jit, static_argnums=0)
def _captured(spec, params, images):
  model = build(spec, spec.dense_layers)
  options = {"capture_intermediates": lambda module, _: module.name == "norm1"}
  return model.apply({"params": params}, images, mutable=["intermediates"], **options)[1]


def _inputs_of_attention(spec, params, images):
  """Returns the tokens that each layer's attention takes in, f[b*n c]."""
  outputs = jax.tree.leaves(_captured(spec, params, images))
  return [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in outputs]


@pytest.mark.parametrize("name", kinds("deit", "eva02", "dinov3", "aimv2"))
def test_masks_of_ones_are_the_dense_model(name):
  spec, params, factors = _factored(name)
  images = random_images(spec, 2)
  counts = [{k: units.length for k, units in sorted_lists(spec).items()}] * spec.depth
  masked = masked_params(params, factors, _masks(spec, counts))
  assert jax.tree.map(jnp.shape, masked) == jax.tree.map(jnp.shape, params)
  dense = _logits(spec, params, images)
  np.testing.assert_allclose(_logits(spec, masked, images), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", kinds("deit", "eva02", "dinov3", "beit"))
def test_the_narrower_network_equals_the_masked_one(name):
  spec, params, factors = _factored(name)
  images, lists = random_images(spec, 2), sorted_lists(spec)
  sizes = [{"hidden": 17, "qk": 4, "value": 3}, {"hidden": 5, "qk": 6, "value": 7}]
  counts = [{k: n for k, n in layer.items() if k in lists} for layer in sizes]
  masked = _logits(spec, masked_params(params, factors, _masks(spec, counts)), images)
  layers, small = slimmed(spec, params, factors, counts)
  narrow = _logits(spec, small, images, layers)
  np.testing.assert_allclose(narrow, masked, rtol=0, atol=1e-5)
  for layer, count in zip(layers, counts, strict=True):
    full = {"hidden": HIDDEN, "qk": HEAD_DIM, "value": HEAD_DIM}
    assert layer.widths._asdict() == {
      k: n * (1 if k == "hidden" else spec.num_heads) for k, n in (full | count).items()
    }
  assert np.abs(masked - _logits(spec, params, images)).max() > 1e-2


def test_lists_that_a_norm_reads_together_are_whole():
  assert sorted(sorted_lists(_measured("eva02")[0])) == ["qk"]
  assert sorted(sorted_lists(_measured("qk_norm_after")[0])) == ["hidden", "value"]
  assert sorted_lists(_measured("dinov3")[0])["qk"].step == 2


def test_moments_are_those_of_all_tokens_at_once():
  spec, params, _ = _measured("deit")
  images = random_images(spec, 5)
  found = calibrate(spec, params, [images[:2], np.asarray(images[2:4]), images[4:]])
  tokens = _inputs_of_attention(spec, params, images)
  for layer, x in zip(found, tokens, strict=True):
    assert layer.tokens.count == len(x)
    np.testing.assert_allclose(layer.tokens.mean, x.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(layer.tokens.covariance, np.cov(x.T, bias=True), rtol=0, atol=1e-5)


def test_calibration_needs_images():
  spec, params, _ = _measured("deit")
  with pytest.raises(UserError, match="expected images to measure the model on"):
    calibrate(spec, params, [])


@pytest.mark.parametrize("size", [9, 150])
def test_the_order_is_that_of_refitting_after_each_removal(size):
  rng = np.random.default_rng(0)
  h = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size))
  covariance, kernel = h.T @ h / len(h), rng.standard_normal((size, 5))
  inverse, w, left, removed = np.linalg.inv(covariance), kernel.copy(), list(range(size)), []
  while left:
    costs = [w[j] @ w[j] / inverse[j, j] for j in left]
    j = left.pop(int(np.argmin(costs)))
    removed.append(j)
    row = inverse[j].copy()
    w = w - np.outer(row, w[j]) / row[j]
    inverse = inverse - np.outer(row, row) / row[j]
  np.testing.assert_array_equal(importance_order(covariance, kernel), removed[::-1])


def test_a_copy_of_a_unit_goes_first():
  rng = np.random.default_rng(0)
  h = rng.standard_normal((1000, 6))
  h[:, 4] = h[:, 1]
  covariance = np.cov(h.T) + 1e-6 * np.eye(6)
  kernel = rng.standard_normal((6, 3))
  kernel[[1, 4]] *= 100  # by its size alone, neither would go
  order = importance_order(covariance, kernel)
  assert order[-1] in (1, 4)
  assert order[0] in (1, 4)


@pytest.mark.parametrize("name", ["deit", "aimv2"])  # with biases and without
def test_fc2_is_the_least_squares_refit(name):
  spec, params, factors = _factored(name)
  images, kept = random_images(spec, 4, seed=1), 10
  fc2 = params["blocks_0"]["mlp"]["fc2"]
  moments = calibrate(spec, params, [images])[0].hidden
  has_bias = "bias" in fc2
  order = np.asarray(factors[0].hidden.order)
  masked = masked_params(params, factors, _masks(spec, [{"hidden": kept}] * spec.depth))
  found = masked["blocks_0"]["mlp"]["fc2"]

  # Ridge regression is least squares with a few more rows.
  root = np.linalg.cholesky(moments.covariance + (not has_bias) * np.outer(*[moments.mean] * 2)).T
  ridge = np.sqrt(1e-4 * np.trace(root.T @ root) / HIDDEN)
  rows = np.concatenate([root, ridge * np.eye(HIDDEN)])
  outputs = rows @ np.asarray(fc2["kernel"], np.float64)
  refit = np.linalg.lstsq(rows[:, order[:kept]], outputs, rcond=None)[0]
  kernel = np.asarray(found["kernel"])
  np.testing.assert_allclose(kernel[order[:kept]], refit, rtol=0, atol=2e-5)
  np.testing.assert_allclose(kernel[order[kept:]], 0, rtol=0, atol=2e-5)
  assert has_bias == ("bias" in found)
  if has_bias:  # the mean output stays
    before = moments.mean @ np.asarray(fc2["kernel"]) + np.asarray(fc2["bias"])
    np.testing.assert_allclose(moments.mean @ kernel + found["bias"], before, rtol=0, atol=1e-5)


def _heads(spec, attn, x):
  """Returns queries, keys and values of the first layer, f[h n k] each."""
  y = x @ np.asarray(attn["qkv"]["kernel"], np.float64) + np.asarray(attn["qkv"]["bias"])
  return y.reshape(len(x), 3, spec.num_heads, HEAD_DIM).transpose(1, 2, 0, 3)


def test_logits_of_a_rank_are_the_best():
  spec, params, factors = _factored("deit")
  x = _inputs_of_attention(spec, params, random_images(spec, 4, seed=1))[0]
  (q, k, _), (q2, k2, _) = (
    _heads(spec, attn, x) for attn in (params["blocks_0"]["attn"], factors[0].attn)
  )

  def logits(q, k):  # what all keys of a query have in common changes no softmax
    return q @ (k - k.mean(axis=1, keepdims=True)).swapaxes(1, 2)

  dense = logits(q, k)
  np.testing.assert_allclose(logits(q2, k2), dense, rtol=0, atol=1e-3)
  for r in (2, 5):
    error = np.linalg.norm(logits(q2[..., :r], k2[..., :r]) - dense, axis=(1, 2))
    plain = np.linalg.norm(logits(q[..., :r], k[..., :r]) - dense, axis=(1, 2))
    best = np.sqrt((np.linalg.svd(dense, compute_uv=False)[:, r:] ** 2).sum(axis=1))
    np.testing.assert_allclose(error, best, rtol=1e-3)  # no matrix of that rank is nearer
    assert (error < 0.8 * plain).all()


def test_outputs_of_a_rank_are_the_best():
  spec, params, factors = _factored("deit")
  x = _inputs_of_attention(spec, params, random_images(spec, 4, seed=1))[0]

  def outputs(attn, r):
    q, k, v = (y.reshape(spec.num_heads, 4, -1, HEAD_DIM) for y in _heads(spec, attn, x))
    weights = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(HEAD_DIM))
    values = weights / weights.sum(axis=3, keepdims=True) @ v[..., :r]
    out = np.asarray(attn["proj"]["kernel"], np.float64).reshape(spec.num_heads, HEAD_DIM, -1)
    y = values.reshape(spec.num_heads, -1, r) @ out[:, :r]
    return y - y.mean(axis=1, keepdims=True)  # the bias takes up the mean

  dense = outputs(params["blocks_0"]["attn"], HEAD_DIM)
  np.testing.assert_allclose(outputs(factors[0].attn, HEAD_DIM), dense, rtol=0, atol=1e-4)
  for r in (2, 5):
    error = np.linalg.norm(outputs(factors[0].attn, r) - dense, axis=(1, 2))
    best = np.sqrt((np.linalg.svd(dense, compute_uv=False)[:, r:] ** 2).sum(axis=1))
    np.testing.assert_allclose(error, best, rtol=1e-3)


def test_constant_values_are_lost_to_the_bias():
  """Values that are the same everywhere can all go: the projection's bias has their sum."""
  spec, params, _ = _measured("deit")
  for i in range(spec.depth):
    qkv = params[f"blocks_{i}"]["attn"]["qkv"]
    kernel = qkv["kernel"].at[:, 2 * spec.width :].set(0)
    params = _changed(params, i, "attn", qkv={**qkv, "kernel": kernel})
  images = random_images(spec, 2)
  factors = factorise(spec, params, calibrate(spec, params, [images]))
  masked = masked_params(params, factors, _masks(spec, [{"value": 1}] * spec.depth))
  dense = _logits(spec, params, images)
  np.testing.assert_allclose(_logits(spec, masked, images), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov3", "rope_mixed"])  # halves, and adjacent channels
def test_pairs_are_ranked_by_their_energy(name):
  """By its definition: the mean square of what a pair adds to the logits of centred keys.

  Over all queries and keys, each being that of any token at any place.
  """
  spec, params, factors = _factored(name)
  x = _inputs_of_attention(spec, params, random_images(spec, 4, seed=1))[0]
  attn = params["blocks_0"]["attn"]
  attn = {"qkv": {"bias": np.zeros(()), **attn["qkv"]}}
  q, k, _ = _heads(spec, attn, x)
  model, halves = build(spec, spec.dense_layers), spec.rotary.halves
  positions = model.apply({"params": params}, 0, method="layer_positions")
  angles = np.asarray(positions.angles, np.float64)

  def turned(y):  # each pair of each token at each place, f[h p t 2]
    first, second = np.split(y, 2, axis=-1) if halves else (y[..., 0::2], y[..., 1::2])
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    first, second = first[:, :, None], second[:, :, None]
    pairs = np.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return pairs.reshape(len(pairs), -1, *pairs.shape[3:]).swapaxes(1, 2)

  q, k = turned(q), turned(k)
  k = k - k.mean(axis=2, keepdims=True)
  energy = np.sum((q.swapaxes(2, 3) @ q) * (k.swapaxes(2, 3) @ k), axis=(2, 3))
  rank = np.asarray(factors[0].qk_rank)
  first = rank[:, : HEAD_DIM // 2] if halves else rank[:, 0::2]
  second = rank[:, HEAD_DIM // 2 :] if halves else rank[:, 1::2]
  np.testing.assert_array_equal(first, 2 * np.argsort(np.argsort(-energy, axis=1), axis=1))
  np.testing.assert_array_equal(second, first + 1)


def test_a_gradient_reaches_every_place():
  spec, params, factors = _factored("deit")
  images = random_images(spec, 2)
  masks = _masks(spec, [{"hidden": 10, "qk": 3, "value": 3}] * spec.depth)

  def loss(masks):
    return jnp.sum(_forward(spec, masked_params(params, factors, masks), images) ** 2)

  for layer in jax.jit(jax.grad(loss))(masks):
    for name, gradient in layer.items():
      assert np.count_nonzero(gradient) == gradient.size, name


def _forward(spec, params, images):
  return build(spec, spec.dense_layers).apply({"params": params}, images)
