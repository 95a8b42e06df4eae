"""RandAugment as DeiT uses it, `rand-m9-mstd0.5-inc1` in timm, with Pillow's operations.

Two operations are drawn for each image, with replacement; each is applied with probability 0.5 and
a magnitude of about 9 out of 10.

Cubuk et al., `RandAugment <https://arxiv.org/abs/1909.13719>`_, 2019;
Touvron et al., `DeiT <https://arxiv.org/abs/2012.12877>`_, 2021, Table 9.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

Image = PIL.Image.Image
Colour = tuple[int, int, int]
# (image, strength in [0, 1], source of random signs, fill colour) -> image
Operation = Callable[[Image, float, np.random.Generator, Colour], Image]

_LAYERS = 2
_PROBABILITY = 0.5
_MAGNITUDE, _MAGNITUDE_STD, _LARGEST = 9.0, 0.5, 10.0


def rand_augment(image: Image, rng: np.random.Generator, fill: Colour) -> Image:
  """Applies two random operations to an RGB image.

  Args:
    image: RGB, of any size.
    rng: Random generator.
    fill: Fill colour for the borders, in [0, 255], such as the mean of the data.
  """
  for name in rng.choice(list(OPERATIONS), _LAYERS):
    if rng.random() >= _PROBABILITY:
      continue
    magnitude = min(max(rng.normal(_MAGNITUDE, _MAGNITUDE_STD), 0.0), _LARGEST)
    image = OPERATIONS[name](image, magnitude / _LARGEST, rng, fill)
  return image


def _signed(value: float, rng: np.random.Generator) -> float:
  return -value if rng.random() < 0.5 else value


def _moved(
  image: Image, matrix: tuple[float, float, float, float, float, float], fill: Colour
) -> Image:
  affine, bicubic = PIL.Image.Transform.AFFINE, PIL.Image.Resampling.BICUBIC
  return image.transform(image.size, affine, matrix, bicubic, fillcolor=fill)


def _rotate(image: Image, strength: float, rng: np.random.Generator, fill: Colour) -> Image:
  bicubic = PIL.Image.Resampling.BICUBIC
  return image.rotate(_signed(30 * strength, rng), bicubic, fillcolor=fill)


def _shear_x(image: Image, strength: float, rng: np.random.Generator, fill: Colour) -> Image:
  return _moved(image, (1, _signed(0.3 * strength, rng), 0, 0, 1, 0), fill)


def _shear_y(image: Image, strength: float, rng: np.random.Generator, fill: Colour) -> Image:
  return _moved(image, (1, 0, 0, _signed(0.3 * strength, rng), 1, 0), fill)


def _translate_x(image: Image, strength: float, rng: np.random.Generator, fill: Colour) -> Image:
  return _moved(image, (1, 0, _signed(0.45 * strength, rng) * image.width, 0, 1, 0), fill)


def _translate_y(image: Image, strength: float, rng: np.random.Generator, fill: Colour) -> Image:
  return _moved(image, (1, 0, 0, 0, 1, _signed(0.45 * strength, rng) * image.height), fill)


def _posterize(image: Image, strength: float, *_: object) -> Image:
  bits = 4 - int(4 * strength)
  if not bits:  # Pillow rejects 0 bits, which give a black image
    return image.point(lambda _: 0)
  return PIL.ImageOps.posterize(image, bits)


def _solarize(image: Image, strength: float, *_: object) -> Image:
  return PIL.ImageOps.solarize(image, 256 - int(256 * strength))


def _solarize_add(image: Image, strength: float, *_: object) -> Image:
  added = int(110 * strength)
  return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def _enhanced(kind: Callable[[Image], Any]) -> Operation:
  """Returns an operation that enhances by a random factor, which strength moves away from 1."""

  def apply(image: Image, strength: float, rng: np.random.Generator, fill: Colour) -> Image:
    del fill
    return kind(image).enhance(max(0.1, 1 + _signed(0.9 * strength, rng)))

  return apply


OPERATIONS: dict[str, Operation] = {
  "auto_contrast": lambda image, *_: PIL.ImageOps.autocontrast(image),
  "equalize": lambda image, *_: PIL.ImageOps.equalize(image),
  "invert": lambda image, *_: PIL.ImageOps.invert(image),
  "rotate": _rotate,
  "posterize": _posterize,
  "solarize": _solarize,
  "solarize_add": _solarize_add,
  "color": _enhanced(PIL.ImageEnhance.Color),
  "contrast": _enhanced(PIL.ImageEnhance.Contrast),
  "brightness": _enhanced(PIL.ImageEnhance.Brightness),
  "sharpness": _enhanced(PIL.ImageEnhance.Sharpness),
  "shear_x": _shear_x,
  "shear_y": _shear_y,
  "translate_x": _translate_x,
  "translate_y": _translate_y,
}
