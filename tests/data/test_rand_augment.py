"""RandAugment's operations, held to plain NumPy where they are simple, and how they are drawn."""

import numpy as np
import PIL.Image
import pytest

from vitcomp_jax.data.rand_augment import OPERATIONS, rand_augment

FILL = (124, 116, 104)


def _image() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)


class _Sign:
  """Draws that always give one sign."""

  def __init__(self, negative: bool) -> None:
    self._value = 0.0 if negative else 0.9

  def random(self) -> float:
    return self._value


def _apply(name: str, strength: float, negative: bool = False) -> np.ndarray:
  image = PIL.Image.fromarray(_image())
  return np.asarray(OPERATIONS[name](image, strength, _Sign(negative), FILL))


def test_there_are_fifteen():
  assert len(OPERATIONS) == 15


def test_invert():
  np.testing.assert_array_equal(_apply("invert", 0.9), 255 - _image())


@pytest.mark.parametrize(("strength", "bits"), [(0.0, 4), (0.9, 1), (0.5, 2), (1.0, 0)])
def test_posterize_keeps_fewer_bits_the_stronger(strength, bits):
  mask = np.uint8(256 - 2 ** (8 - bits)) if bits else np.uint8(0)
  np.testing.assert_array_equal(_apply("posterize", strength), _image() & mask)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9, 1.0])
def test_solarize_inverts_from_a_threshold(strength):
  threshold, image = 256 - int(256 * strength), _image()
  np.testing.assert_array_equal(
    _apply("solarize", strength), np.where(image >= threshold, 255 - image, image)
  )


def test_solarize_add_brightens_the_dark_half():
  image = _image().astype(int)
  expected = np.where(image < 128, np.minimum(image + 99, 255), image)
  np.testing.assert_array_equal(_apply("solarize_add", 0.9), expected)


@pytest.mark.parametrize("negative", [False, True])
def test_brightness_multiplies(negative):
  factor = 0.19 if negative else 1.81
  expected = np.clip(_image() * factor, 0, 255)
  np.testing.assert_allclose(_apply("brightness", 0.9, negative), expected, atol=1)


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_an_enhancement_without_strength_changes_nothing(name):
  np.testing.assert_array_equal(_apply(name, 0.0), _image())


def test_translations_move_by_a_share_of_the_side():
  # 0.45 of 0.5 of 40 rows is 9 rows; what moves in has the fill's colour.
  moved, image = _apply("translate_y", 0.5), _image()
  np.testing.assert_array_equal(moved[:-9], image[9:])
  np.testing.assert_array_equal(moved[-9:], np.broadcast_to(FILL, (9, 32, 3)))


@pytest.mark.parametrize("name", ["shear_x", "translate_x", "rotate", "shear_y", "translate_y"])
def test_a_movement_without_strength_changes_nothing(name):
  np.testing.assert_array_equal(_apply(name, 0.0), _image())


def test_half_of_two_operations_are_done(monkeypatch):
  done = []
  for name in OPERATIONS:
    monkeypatch.setitem(
      OPERATIONS,
      name,
      lambda image, strength, *_, name=name: done.append((name, strength)) or image,
    )
  image = PIL.Image.fromarray(_image())
  for seed in range(3000):
    rand_augment(image, np.random.default_rng(seed), FILL)
  assert len(done) == pytest.approx(3000, rel=0.05)
  names, strengths = zip(*done, strict=True)
  assert set(names) == set(OPERATIONS)
  assert np.mean(strengths) == pytest.approx(0.9, abs=0.005)
  # What is drawn above the largest magnitude is cut down to it.
  assert max(strengths) == 1.0 and np.std(strengths) == pytest.approx(0.05, abs=0.01)


def test_an_image_keeps_its_size_and_kind():
  image = PIL.Image.fromarray(_image())
  found = [rand_augment(image, np.random.default_rng(seed), FILL) for seed in range(100)]
  assert {(f.size, f.mode) for f in found} == {(image.size, "RGB")}
