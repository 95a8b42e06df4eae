"""Transforms images to the model's input; pixels equal those of timm's evaluation transform.

Images stay uint8 until `normalize`, which runs inside the jitted step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import PIL.Image

from vitcomp_jax.data.images import to_rgb
from vitcomp_jax.errors import UserError

AUGMENTS = ("none", "flip_shift", "crop_flip", "rand_augment")
CROP_MODES = ("center", "squash", "border")
_RESAMPLING = {
  "bicubic": PIL.Image.Resampling.BICUBIC,
  "bilinear": PIL.Image.Resampling.BILINEAR,
  "lanczos": PIL.Image.Resampling.LANCZOS,
  "nearest": PIL.Image.Resampling.NEAREST,
}
_LARGE = 2**24  # pixels of a resized image above which only the crop is computed

Array = TypeVar("Array")


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """The preprocessing of images.

  Attributes:
    image_size: Height and width of the model's input, in pixels.
    mean: Means of the red, green and blue values, which are in [0, 1].
    std: Standard deviations of the red, green and blue values.
    crop_pct: Share of the resized image's side that the centre crop keeps.
    interpolation: `bicubic`, `bilinear`, `lanczos` or `nearest`.
    pad: Pixels of zeros added to every side first.
    crop_mode: `center` resizes the shorter side and crops the centre; `squash` resizes both sides
      and crops the centre; `border` resizes the longer side and pads with the mean.
    exif_orientation: Whether images are rotated or flipped as their EXIF tag says.
  """

  image_size: tuple[int, int]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  crop_pct: float
  interpolation: str
  pad: int = 0
  crop_mode: str = "center"
  exif_orientation: bool = False

  def __post_init__(self) -> None:
    if self.interpolation not in _RESAMPLING:
      raise UserError(
        f"interpolation: expected one of {tuple(_RESAMPLING)}, got {self.interpolation!r}."
      )
    if self.crop_mode not in CROP_MODES:
      raise UserError(f"crop_mode: expected one of {CROP_MODES}, got {self.crop_mode!r}.")
    if not 0 < self.crop_pct <= 1:
      raise UserError(f"config.data.crop_pct: expected a number in (0, 1], got {self.crop_pct}.")
    for name in ("mean", "std"):
      if len(getattr(self, name)) != 3:
        raise UserError(
          f"config.data.{name}: expected three numbers, of red, green and blue, got "
          f"{getattr(self, name)}."
        )
    if self.pad < 0:
      raise UserError(f"config.data.pad: expected at least 0 pixels, got {self.pad}.")

  @property
  def fill(self) -> tuple[int, int, int]:
    """Returns the mean as an RGB colour in [0, 255], for filling borders."""
    red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
    return red, green, blue


def evaluation_image(image: PIL.Image.Image | np.ndarray, pre: Preprocess) -> np.ndarray:
  """Resizes an image and crops its centre, as timm's evaluation transform does.

  Args:
    image: PIL image, or uint8 array as for `images.to_rgb`.
    pre: Preprocessing of the image.

  Returns:
    uint8[h w 3] with h, w = `pre.image_size`.

  Raises:
    CorruptImage: If the image cannot be converted to RGB.
  """
  rgb = to_rgb(image, pre.pad, pre.exif_orientation)
  height, width = pre.image_size
  resized = _resized_size((rgb.height, rgb.width), pre)
  top, left = _offset(resized[0], height), _offset(resized[1], width)
  # This is the part of the crop inside the image; the rest is filled below.
  bottom, right = min(top + height, resized[0]), min(left + width, resized[1])
  window = (max(left, 0), max(top, 0), right, bottom)
  part = _resized_part(rgb, (resized[1], resized[0]), window, pre.interpolation)
  if part.size == (width, height):
    return np.asarray(part)
  canvas = PIL.Image.new("RGB", (width, height), pre.fill if pre.crop_mode == "border" else 0)
  canvas.paste(part, (max(-left, 0), max(-top, 0)))
  return np.asarray(canvas)


def _resized_size(size: tuple[int, int], pre: Preprocess) -> tuple[int, int]:
  """Returns the height and width after resizing, rounded as in torchvision and timm."""
  height, width = size
  target = [math.floor(side / pre.crop_pct) for side in pre.image_size]
  if pre.crop_mode == "squash":
    return target[0], target[1]
  if pre.crop_mode == "center" and target[0] == target[1]:
    if width <= height:  # torchvision's Resize truncates the longer side
      return int(target[0] * height / width), target[0]
    return target[0], int(target[0] * width / height)
  # timm's ResizeKeepRatio rounds both sides.
  choose = max if pre.crop_mode == "border" else min
  ratio = choose(height / target[0], width / target[1])
  return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _offset(length: int, kept: int) -> int:
  """Returns the start of a centre crop, as in torchvision; negative if padding is needed."""
  spare = length - kept
  return round(spare / 2) if spare >= 0 else -(-spare // 2)


def _resized_part(
  image: PIL.Image.Image,
  size: tuple[int, int],
  window: tuple[int, int, int, int],
  interpolation: str,
) -> PIL.Image.Image:
  """Resizes an image and crops a window; if the result is large, only the window is computed.

  Args:
    image: RGB image.
    size: Width and height of the resized image.
    window: Left, top, right and bottom in the resized image.
    interpolation: Interpolation for resizing.

  Returns:
    The window of the resized image.
  """
  if math.prod(size) <= _LARGE:
    return _resize(image, size[1], size[0], interpolation).crop(window)
  # A long strip would be resized to far more pixels than are kept. Pillow can resize only a box of
  # an image, with other rounding errors. It computes in 32 bits, so pass only the pixels it needs.
  scales = np.array(image.size) / size
  first, last = window[:2] * scales, window[2:] * scales
  reach = np.ceil(3 * np.maximum(scales, 1)) + 1  # of Lanczos, the widest filter
  begin = np.maximum(np.floor(first) - reach, 0)
  end = np.minimum(np.ceil(last) + reach, image.size)
  part = image.crop((int(begin[0]), int(begin[1]), int(end[0]), int(end[1])))
  box = (*(first - begin).tolist(), *(last - begin).tolist())
  kept = (window[2] - window[0], window[3] - window[1])
  return part.resize(kept, _RESAMPLING[interpolation], box)


def _resize(image: PIL.Image.Image, height: int, width: int, interpolation: str) -> PIL.Image.Image:
  if image.size == (width, height):
    return image
  return image.resize((width, height), _RESAMPLING[interpolation])


def normalize(images: Array, pre: Preprocess) -> Array:
  """Scales pixels to [0, 1], then subtracts the mean and divides by the standard deviation.

  Args:
    images: uint8[... 3], of NumPy or JAX; floats are assumed to be normalised and returned as is.
    pre: Preprocessing; only `mean` and `std` are used.

  Returns:
    float32[... 3], of the same library.
  """
  if np.issubdtype(cast(Any, images).dtype, np.floating):
    return images
  shape = (1,) * (images.ndim - 1) + (3,)  # type: ignore[attr-defined]
  mean = np.asarray(pre.mean, np.float32).reshape(shape)
  std = np.asarray(pre.std, np.float32).reshape(shape)
  pixels = cast(Any, images).astype(np.float32)  # NumPy and JAX arrays have no common type
  return cast(Array, (pixels / np.float32(255) - mean) / std)


def flip_shift(images: np.ndarray, flips: np.ndarray, shifts: np.ndarray) -> np.ndarray:
  """Flips and shifts images, filling gaps with zeros.

  Args:
    images: uint8[b h w c].
    flips: bool[b], whether an image is flipped left to right.
    shifts: int[b 2], shifts down and to the right, in pixels.

  Returns:
    uint8[b h w c].
  """
  reach = int(np.abs(shifts).max(initial=0))
  flipped = np.where(flips[:, None, None, None], images[:, :, ::-1], images)
  padded = np.pad(flipped, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
  rows, columns = reach - shifts[:, 0], reach - shifts[:, 1]
  moved = windows[np.arange(len(images)), rows, columns]  # b c h w
  return np.ascontiguousarray(moved.transpose(0, 2, 3, 1))


def random_flip_shift(
  images: np.ndarray, rngs: Sequence[np.random.Generator], max_shift: int = 2
) -> np.ndarray:
  """Flips images with probability 0.5 and shifts them by up to `max_shift` pixels each way.

  Args:
    images: uint8[b h w c].
    rngs: Random generator of each image.
    max_shift: Largest shift, in pixels.

  Returns:
    uint8[b h w c].
  """
  flips = np.array([rng.random() < 0.5 for rng in rngs])
  shifts = [rng.integers(-max_shift, max_shift, size=2, endpoint=True) for rng in rngs]
  return flip_shift(images, flips, np.array(shifts))


def random_crop_box(
  size: tuple[int, int],
  rng: np.random.Generator,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
  """Draws the box of torchvision's RandomResizedCrop.

  Args:
    size: Height and width of the image, in pixels.
    rng: Random generator.
    scale: Range of the box's share of the image's area, drawn uniformly.
    ratio: Range of width over height, drawn log-uniformly.

  Returns:
    Top, left, height and width, in pixels.
  """
  height, width = size
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  # No box fitted: take the largest central box with an allowed ratio.
  w, h = width, height
  if width / height < ratio[0]:
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


def random_crop_flip(
  image: PIL.Image.Image | np.ndarray, pre: Preprocess, rng: np.random.Generator
) -> PIL.Image.Image:
  """Resizes a random box of an image to the input size, and flips it with probability 0.5.

  Args:
    image: PIL image, or uint8 array as for `images.to_rgb`.
    pre: Preprocessing of the image; `crop_pct` and `crop_mode` are not used.
    rng: Random generator.

  Returns:
    An RGB image of `pre.image_size`.

  Raises:
    CorruptImage: If the image cannot be converted to RGB.
  """
  rgb = to_rgb(image, pre.pad, pre.exif_orientation)
  top, left, height, width = random_crop_box((rgb.height, rgb.width), rng)
  box = (left, top, left + width, top + height)
  # Crop first, so that no pixel outside the box contributes.
  rgb = _resize(rgb.crop(box), *pre.image_size, pre.interpolation)
  flip = PIL.Image.Transpose.FLIP_LEFT_RIGHT
  return rgb.transpose(flip) if rng.random() < 0.5 else rgb
