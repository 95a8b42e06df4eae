"""Decodes image files to the RGB image that a viewer shows."""

import functools
import io
import warnings

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from vitcomp_jax.errors import UserError

# Stubs without a decoder, and what starts a program outside of Pillow.
_FOREIGN = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_DEEP = ("I", "F")  # No range is known that 8 bits could be scaled from.
_Turn = PIL.Image.Transpose
_TURNS = {  # by EXIF's orientation, as `PIL.ImageOps.exif_transpose`
  2: _Turn.FLIP_LEFT_RIGHT,
  3: _Turn.ROTATE_180,
  4: _Turn.FLIP_TOP_BOTTOM,
  5: _Turn.TRANSPOSE,
  6: _Turn.ROTATE_270,
  7: _Turn.TRANSVERSE,
  8: _Turn.ROTATE_90,
}

# It warns of large pictures and odd metadata without saying in which file. What cannot be shown is
# an error, which does; a filter per image would not be safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class CorruptImage(UserError):
  """Raised for an image that cannot be read or decoded; the message names it."""


@functools.cache
def suffixes() -> frozenset[str]:
  """Returns the lower-case suffixes of the files that the installed Pillow can decode."""
  known = {*_formats(), "MPO"}  # JPEG's reader opens MPO too.
  return frozenset(s for s, name in PIL.Image.registered_extensions().items() if name in known)


@functools.cache
def _formats() -> tuple[str, ...]:
  PIL.Image.preinit()  # The common ones, which are tried first.
  PIL.Image.init()
  return tuple(name for name in PIL.Image.ID if name not in _FOREIGN)


def decode(content: bytes, what: str) -> PIL.Image.Image:
  """Decodes an image file.

  Args:
    content: Of the file.
    what: Names it in errors, those of `to_rgb` too.

  Returns:
    The image, wholly decoded.

  Raises:
    CorruptImage: If it cannot be decoded.
  """
  try:
    image = PIL.Image.open(io.BytesIO(content), formats=_formats())
    image.load()
  except PIL.UnidentifiedImageError as error:
    raise CorruptImage(f"{what}: not an image") from error
  except PIL.Image.DecompressionBombError as error:
    raise CorruptImage(f"{what}: too many pixels ({_line(error)})") from error
  except Exception as error:  # Of broken files Pillow's readers raise whatever comes.
    raise CorruptImage(f"{what}: {_line(error)}") from error
  image.filename = what
  return image


def to_rgb(
  image: PIL.Image.Image | np.ndarray, pad: int = 0, exif_orientation: bool = False
) -> PIL.Image.Image:
  """Makes an RGB image with zeros around it.

  Args:
    image: PIL image, whose values are scaled to 8 bits if it has 16 per channel; or uint8[h w],
      uint8[h w 1] or uint8[h w 3].
    pad: Pixels added on every side.
    exif_orientation: Whether it is turned as its EXIF tag says before anything else.

  Returns:
    The RGB image.

  Raises:
    CorruptImage: If it cannot be converted; the message names the file, where it is known.
  """
  if isinstance(image, np.ndarray):
    image = _from_array(image)
  name = getattr(image, "filename", "") or "image"
  if image.mode in _DEEP:
    raise CorruptImage(
      f"{name}: mode {image.mode} has 32 bits per channel of no known range (convert it to 8 bits)"
    )
  try:
    if exif_orientation and (turn := exif_turn(image)) is not None:
      image = image.transpose(turn)
    if image.mode.startswith("I;16"):
      # The high byte, as Pillow itself decodes colours of 16 bits; `convert` would clip to white.
      image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    rgb = image.convert("RGB")
  except (OSError, ValueError) as error:
    raise CorruptImage(f"{name}: mode {image.mode} does not become RGB ({_line(error)})") from error
  return PIL.ImageOps.expand(rgb, pad, fill=0) if pad else rgb


def _from_array(array: np.ndarray) -> PIL.Image.Image:
  try:
    return PIL.Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
  except (TypeError, ValueError, IndexError) as error:
    got = f"{array.dtype}{list(array.shape)}"
    raise CorruptImage(f"image: expected uint8[h w] or uint8[h w 3], got {got}") from error


def exif_turn(image: PIL.Image.Image | np.ndarray) -> PIL.Image.Transpose | None:
  """Returns how a viewer turns an image as its EXIF tag says; None: it does not."""
  if isinstance(image, np.ndarray):
    return None
  try:
    return _TURNS.get(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
  except Exception:  # EXIF data that cannot be read turn nothing, in a viewer neither.
    return None


def _line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
