"""Decodes image files and converts them to RGB as image viewers do."""

import functools
import io
import warnings

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from vitcomp_jax.errors import UserError

# Formats without a decoder, and formats for which Pillow starts another program.
_FOREIGN = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_DEEP = ("I", "F")  # their range is unknown, so they cannot be scaled to 8 bits
_Turn = PIL.Image.Transpose
_TURNS = {  # by EXIF orientation, as in `PIL.ImageOps.exif_transpose`
  2: _Turn.FLIP_LEFT_RIGHT,
  3: _Turn.ROTATE_180,
  4: _Turn.FLIP_TOP_BOTTOM,
  5: _Turn.TRANSPOSE,
  6: _Turn.ROTATE_270,
  7: _Turn.TRANSVERSE,
  8: _Turn.ROTATE_90,
}

# Pillow warns about large images and odd metadata without naming the file. Images that cannot be
# decoded raise an error that names it. A warning filter per image would not be thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class CorruptImage(UserError):
  """Reports an image that cannot be read or decoded; the message names it."""


@functools.cache
def suffixes() -> frozenset[str]:
  """Returns the lower-case suffixes of the files that the installed Pillow can decode."""
  known = {*_formats(), "MPO"}  # the JPEG reader also opens MPO
  return frozenset(s for s, name in PIL.Image.registered_extensions().items() if name in known)


@functools.cache
def _formats() -> tuple[str, ...]:
  PIL.Image.preinit()  # registers the common formats, so that they are tried first
  PIL.Image.init()
  return tuple(name for name in PIL.Image.ID if name not in _FOREIGN)


def decode(content: bytes, what: str) -> PIL.Image.Image:
  """Decodes an image file.

  Args:
    content: Bytes of the file.
    what: Name of the file in error messages, including those of `to_rgb`.

  Returns:
    The image, fully decoded.

  Raises:
    CorruptImage: If the file cannot be decoded.
  """
  try:
    image = PIL.Image.open(io.BytesIO(content), formats=_formats())
    image.load()
  except PIL.UnidentifiedImageError as error:
    raise CorruptImage(f"{what}: not an image") from error
  except PIL.Image.DecompressionBombError as error:
    raise CorruptImage(f"{what}: too many pixels ({_line(error)})") from error
  except Exception as error:  # Pillow raises errors of any type for broken files
    raise CorruptImage(f"{what}: {_line(error)}") from error
  image.filename = what
  return image


def to_rgb(
  image: PIL.Image.Image | np.ndarray, pad: int = 0, exif_orientation: bool = False
) -> PIL.Image.Image:
  """Converts an image to RGB and pads it with zeros.

  Args:
    image: PIL image, which is scaled to 8 bits if it has 16 per channel; or uint8[h w],
      uint8[h w 1] or uint8[h w 3].
    pad: Pixels added to every side.
    exif_orientation: Whether the image is first rotated or flipped as its EXIF tag says.

  Returns:
    The RGB image.

  Raises:
    CorruptImage: If the image cannot be converted; the message names the file if known.
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
      # Keep the high byte, as Pillow does for 16-bit colours; `convert` would clip to white.
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
  """Returns the transpose that an image's EXIF tag requests from viewers; None if there is none."""
  if isinstance(image, np.ndarray):
    return None
  try:
    return _TURNS.get(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
  except Exception:  # viewers ignore EXIF data that cannot be read
    return None


def _line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__
