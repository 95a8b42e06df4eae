"""Images of many kinds, and the checksums of what timm's evaluation transform makes of each.

    python tests/data/crops.py

writes them to `timm_crops.npz`, where timm is installed. The images are made of integers alone, so
that they are the same everywhere.
"""

import itertools
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image

FILE = pathlib.Path(__file__).parent / "timm_crops.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((32, 32), (33, 33), (64, 64), (224, 224), (48, 32), (30, 70), (16, 97))
CROPS = (0.875, 0.95, 1.0)
MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear")
SETTINGS = tuple(itertools.product(SIZES, CROPS, MODES, INTERPOLATIONS))
_CHANNELS = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "RGBA": 4, "CMYK": 4}
_KINDS = (  # mode, width, height
  *(("RGB", 1, 1), ("RGB", 1, 7), ("RGB", 7, 1), ("RGB", 2, 3), ("RGB", 31, 33), ("RGB", 32, 32)),
  *(("RGB", 33, 31), ("RGB", 100, 99), ("RGB", 101, 150), ("RGB", 224, 224), ("RGB", 257, 129)),
  *(("RGB", 300, 7), ("RGB", 7, 300), ("RGB", 500, 375), ("RGB", 333, 500), ("RGB", 1000, 201)),
  *(("RGB", 97, 1000), ("L", 53, 71), ("L", 400, 300), ("LA", 71, 53), ("LA", 64, 64)),
  *(("P", 120, 90), ("P", 37, 113), ("RGBA", 90, 120), ("RGBA", 225, 223), ("CMYK", 80, 60)),
  *(("CMYK", 45, 99), ("1", 60, 61), ("1", 150, 40), ("YCbCr", 66, 44), ("HSV", 44, 66)),
)


def images() -> Iterator[tuple[str, PIL.Image.Image]]:
  """Names and images."""
  for mode, width, height in _KINDS:
    channels = _CHANNELS.get(mode, 1)
    y, x, c = np.ogrid[:height, :width, :channels]
    values = (x * y + 7 * x + 13 * y + 41 * c + (x * x * (c + 3) + y * y * y) // 11) % 256
    # Noise on the left, a ramp on the right.
    values = np.where(
      2 * x < width, values, (x + 2 * y + 60 * c) * 255 // (width + 2 * height + 180)
    )
    pixels = np.clip(values, 0, 255).astype(np.uint8)
    if mode == "1":
      image = PIL.Image.fromarray(pixels[:, :, 0] > 127)
    else:
      image = PIL.Image.frombytes(mode, (width, height), pixels.tobytes())
    if mode == "P":
      image.putpalette([(37 * i + 11 * (i % 3)) % 256 for i in range(768)])
    yield f"{mode} {width}x{height}", image


def checksum(pixels: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(pixels).tobytes())


def main() -> None:
  import timm
  from timm.data.transforms_factory import transforms_imagenet_eval

  found = np.zeros((len(_KINDS), len(SETTINGS)), np.uint32)
  for j, (size, crop_pct, crop_mode, interpolation) in enumerate(SETTINGS):
    transform = transforms_imagenet_eval(
      size, crop_pct, crop_mode, interpolation=interpolation, mean=MEAN, std=STD, normalize=False
    )
    for i, (_, image) in enumerate(images()):
      try:
        found[i, j] = checksum(transform(image.convert("RGB")).numpy().transpose(1, 2, 0))
      except ValueError as error:  # A side of no pixels: nothing to be equal to.
        print(f"{image.mode} {image.size} {size} {crop_mode}: {error}")
  np.savez_compressed(FILE, checksums=found, timm=timm.__version__, pillow=PIL.__version__)
  print(f"{found.size} checksums, {np.sum(found == 0)} of them none")


if __name__ == "__main__":
  main()
