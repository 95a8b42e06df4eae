"""Mixing and erasing, held to plain NumPy, and the inputs of a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcomp_jax.data import mixing
from vitcomp_jax.data.transforms import Preprocess, normalize

SIZE = (12, 10)
PRE = Preprocess(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 1.0, "bicubic")


def _images(count: int) -> np.ndarray:
  return np.random.default_rng(0).random((count, *SIZE, 3)).astype(np.float32)


def _targets(count: int) -> np.ndarray:
  return np.random.default_rng(1).dirichlet(np.ones(5), count).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_equals_numpy(share):
  images, targets = _images(4), _targets(4)
  none = np.zeros((4, 4), np.int32)
  mixed, target = mixing.mix(images, targets, np.full(4, share, np.float32), none)
  for i in range(4):
    other = i + 1 if i % 2 == 0 else i - 1
    np.testing.assert_allclose(mixed[i], share * images[i] + (1 - share) * images[other], atol=1e-6)
    expected = share * targets[i] + (1 - share) * targets[other]
    np.testing.assert_allclose(target[i], expected, atol=1e-6)


@pytest.mark.parametrize("box", [(0, 0, 12, 10), (2, 3, 7, 9), (0, 0, 1, 1), (11, 9, 12, 10)])
def test_cutmix_equals_numpy(box):
  images, targets = _images(4), _targets(4)
  top, left, bottom, right = box
  share = 1 - (bottom - top) * (right - left) / (SIZE[0] * SIZE[1])
  boxes = np.tile(np.array(box, np.int32), (4, 1))
  mixed, target = mixing.mix(images, targets, np.full(4, share, np.float32), boxes)
  for i in range(4):
    other = i + 1 if i % 2 == 0 else i - 1
    expected = images[i].copy()
    expected[top:bottom, left:right] = images[other, top:bottom, left:right]
    np.testing.assert_array_equal(mixed[i], expected)
    own = share * targets[i] + (1 - share) * targets[other]
    np.testing.assert_allclose(target[i], own, atol=1e-6)


def test_the_share_of_cutmix_is_that_of_what_is_left():
  """What of a box lies outside of the image is cut off, and the share grows accordingly."""
  rng = np.random.default_rng(0)
  drawn = [mixing.draw_mix(SIZE, rng, 0.0, 1.0) for _ in range(500)]
  for share, (top, left, bottom, right) in drawn:
    assert 0 <= top <= bottom <= SIZE[0] and 0 <= left <= right <= SIZE[1]
    assert share == pytest.approx(1 - (bottom - top) * (right - left) / (SIZE[0] * SIZE[1]))
  assert len({share for share, _ in drawn}) > 20


def test_mixup_and_cutmix_take_turns():
  rng = np.random.default_rng(0)
  boxes = [mixing.draw_mix((224, 224), rng, 0.8, 1.0)[1] for _ in range(2000)]
  cuts = np.mean([box != (0, 0, 0, 0) for box in boxes])
  assert 0.45 < cuts < 0.55
  shares = [mixing.draw_mix(SIZE, rng, 0.8, 0.0)[0] for _ in range(4000)]
  assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
  # The variance of a Beta(a, a) is 1 / (4 (2a + 1)).
  assert np.var(shares) == pytest.approx(1 / (4 * 2.6), rel=0.05)
  assert mixing.draw_mix(SIZE, rng, 0.0, 0.0) == (1.0, (0, 0, 0, 0))


def test_erasing_equals_numpy():
  images, row = _images(3), jnp.arange(3)
  boxes = np.array([(1, 2, 5, 9), (0, 0, 0, 0), (0, 0, 12, 10)], np.int32)
  key = jax.random.key(3)
  erased = np.asarray(mixing.erase(images, boxes, key, row))
  for i, (top, left, bottom, right) in enumerate(boxes):
    inside = np.zeros(SIZE, bool)
    inside[top:bottom, left:right] = True
    np.testing.assert_array_equal(erased[i][~inside], images[i][~inside])
    noise = jax.random.normal(jax.random.fold_in(key, i), (*SIZE, 3))
    np.testing.assert_array_equal(erased[i][inside], np.asarray(noise)[inside])
  # A row's noise is its own, wherever it is made.
  alone = mixing.erase(images[2:], boxes[2:], key, row[2:])
  np.testing.assert_array_equal(alone[0], erased[2])


def test_erased_boxes_have_the_areas_and_aspects_asked_for():
  rng, size = np.random.default_rng(0), (224, 224)
  boxes = np.array([mixing.draw_erased(size, rng, 0.25) for _ in range(8000)])
  height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  is_erased = height > 0
  assert np.mean(is_erased) == pytest.approx(0.25, abs=0.02)
  area = (height * width)[is_erased] / (224 * 224)
  assert area.min() > 0.019 and area.max() < 0.335
  aspect = (height / np.maximum(width, 1))[is_erased]
  assert aspect.min() > 0.29 and aspect.max() < 3.4
  assert (boxes >= 0).all() and (boxes <= 224).all()
  assert mixing.draw_erased(size, rng, 0.0) == (0, 0, 0, 0)


def test_the_inputs_of_a_step():
  pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
  batch = {"image": jnp.asarray(pixels), "label": jnp.array([3, 1]), "row": jnp.arange(2)}
  images, targets = mixing.training_inputs(batch, PRE, 5, 0.1, jax.random.key(0))
  np.testing.assert_array_equal(images, normalize(batch["image"], PRE))
  expected = np.full((2, 5), 0.02)
  expected[[0, 1], [3, 1]] += 0.9
  np.testing.assert_allclose(targets, expected, atol=1e-7)
  batch |= {"mix_share": jnp.full(2, 0.25), "mix_box": jnp.zeros((2, 4), jnp.int32)}
  mixed, target = mixing.training_inputs(batch, PRE, 5, 0.1, jax.random.key(0))
  np.testing.assert_allclose(mixed[0], 0.25 * images[0] + 0.75 * images[1], atol=1e-6)
  np.testing.assert_allclose(target[1], 0.25 * expected[1] + 0.75 * expected[0], atol=1e-6)
