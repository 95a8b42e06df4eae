"""The transforms equal timm's; the augmentations equal plain loops.

`timm_transforms.npz` holds what timm 1.0.31 and torchvision made of three images, `timm_crops.npz`
checksums of what timm made of those of `crops`.
"""

import dataclasses
import pathlib
import subprocess
import sys

import crops
import numpy as np
import PIL.Image
import pytest

from vitcomp_jax.data import transforms
from vitcomp_jax.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS = {
  "224_0.9_bicubic": ((224, 224), 0.9, "bicubic"),
  "224_0.875_bilinear": ((224, 224), 0.875, "bilinear"),
  "32_1.0_bicubic": ((32, 32), 1.0, "bicubic"),
  "48x32_0.9_bicubic": ((48, 32), 0.9, "bicubic"),
  "33_0.95_bilinear": ((33, 33), 0.95, "bilinear"),
}


@pytest.fixture(scope="module")
def timm() -> dict[str, np.ndarray]:
  with np.load(pathlib.Path(__file__).parent / "timm_transforms.npz") as arrays:
    return dict(arrays)


def preprocess(
  size: tuple[int, int], crop_pct: float = 1.0, interpolation: str = "bicubic", pad: int = 0
) -> transforms.Preprocess:
  return transforms.Preprocess(size, MEAN, STD, crop_pct, interpolation, pad)


@pytest.mark.parametrize("image", ["wide", "tall", "gray"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_evaluation_image_equals_timm(
  timm: dict[str, np.ndarray], image: str, setting: str
) -> None:
  got = transforms.evaluation_image(timm[f"image/{image}"], preprocess(*SETTINGS[setting]))
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, timm[f"eval/{image}/{setting}"])


def test_normalize_equals_timm(timm: dict[str, np.ndarray]) -> None:
  got = transforms.normalize(timm["eval/wide/32_1.0_bicubic"], preprocess((32, 32)))
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, timm["normalized/wide/32_1.0_bicubic"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(400, 100), (190, 401), (50, 60)])
def test_center_crop_equals_torchvision(
  timm: dict[str, np.ndarray], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(transforms, "_resized_size", lambda size, pre: size)
  got = transforms.evaluation_image(timm["image/wide"], preprocess(size))
  np.testing.assert_array_equal(got, timm[f"center/{size[0]}x{size[1]}"])


@pytest.mark.parametrize("kind", [name for name, _ in crops.images()])
def test_every_crop_mode_equals_timm(kind: str) -> None:
  with np.load(crops.FILE) as arrays:
    wanted = arrays["checksums"][[name for name, _ in crops.images()].index(kind)]
  image = dict(crops.images())[kind]
  wrong = []
  for setting, want in zip(crops.SETTINGS, wanted, strict=True):
    size, crop_pct, crop_mode, interpolation = setting
    pre = transforms.Preprocess(size, crops.MEAN, crops.STD, crop_pct, interpolation, 0, crop_mode)
    got = transforms.evaluation_image(image, pre)
    assert got.shape == (*size, 3)
    if want and crops.checksum(got) != want:  # 0: timm refuses it.
      wrong.append(setting)
  assert not wrong


def test_a_border_has_the_colour_of_the_mean() -> None:
  pre = dataclasses.replace(preprocess((16, 97)), crop_mode="border")
  got = transforms.evaluation_image(np.full((300, 1, 3), 9, np.uint8), pre)
  assert (got[:, 48] == 9).all()  # One pixel stays of what would be a twentieth.
  assert (np.delete(got, 48, axis=1) == (124, 116, 104)).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("crop_mode", transforms.CROP_MODES)
def test_a_part_alone_is_resized_as_the_whole(
  crop_mode: str, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  rng = np.random.default_rng(0)
  for height, width in ((3, 700), (700, 3), (40, 300), (300, 40), (61, 67), (1, 900), (900, 1)):
    image = rng.integers(100, 156, size=(height, width, 3), dtype=np.uint8)
    for size in ((32, 32), (48, 30)):
      pre = preprocess(size, 0.875, interpolation)
      pre = dataclasses.replace(pre, crop_mode=crop_mode)
      monkeypatch.setattr(transforms, "_LARGE", 2**24)
      whole = transforms.evaluation_image(image, pre).astype(int)
      monkeypatch.setattr(transforms, "_LARGE", 0)
      part = transforms.evaluation_image(image, pre).astype(int)
      assert np.abs(whole - part).max() <= 2 and np.abs(whole - part).mean() < 0.3


@pytest.mark.slow
def test_a_long_strip_takes_no_more_memory_than_a_photograph() -> None:
  code = """
import resource
import PIL.Image
from vitcomp_jax.data import transforms
small = transforms.Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic")
transforms.evaluation_image(PIL.Image.new("RGB", (500, 375)), small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in (20000, 1), (1, 20000), (19999, 3), (400000, 1):
  image = PIL.Image.new("RGB", size, (9, 8, 7))
  for mode in transforms.CROP_MODES:
    pre = transforms.Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic", 0, mode)
    pixels = transforms.evaluation_image(image, pre)
    assert mode == "border" or (pixels == (9, 8, 7)).all()
  more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert more < 200 * 2**10, f"{size}: {more} KiB"
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_crop_flip_equals_torchvision(
  timm: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(transforms, "random_crop_box", lambda size, rng: (17, 40, 111, 97))
  pre, want = preprocess((64, 48)), timm["resized_crop/17_40_111_97"]
  seen = set()
  for seed in range(8):
    rng = np.random.default_rng(seed)
    flip = np.random.default_rng(seed).random() < 0.5
    got = np.asarray(transforms.random_crop_flip(timm["image/wide"], pre, rng))
    np.testing.assert_array_equal(got, want[:, ::-1] if flip else want)
    seen.add(flip)
  assert seen == {False, True}


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
  image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
  np.testing.assert_array_equal(transforms.evaluation_image(image, preprocess((32, 32))), image)


def test_pad_puts_zeros_around_a_gray_image() -> None:
  image = np.random.default_rng(0).integers(256, size=(28, 28), dtype=np.uint8)
  want = np.repeat(np.pad(image, 1)[:, :, None], 3, axis=2)
  for given in (image, image[:, :, None], PIL.Image.fromarray(image)):
    got = transforms.evaluation_image(given, preprocess((30, 30), pad=1))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
  image = PIL.Image.new(mode, (40, 50))
  assert transforms.evaluation_image(image, preprocess((16, 16))).shape == (16, 16, 3)


def test_flip_shift_equals_a_loop() -> None:
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(40, 7, 9, 3), dtype=np.uint8)
  flips = rng.random(40) < 0.5
  shifts = rng.integers(-2, 2, size=(40, 2), endpoint=True)
  want = np.zeros_like(images)
  for b, image in enumerate(images):
    for y in range(7):
      for x in range(9):
        from_y, from_x = y - shifts[b, 0], x - shifts[b, 1]
        if 0 <= from_y < 7 and 0 <= from_x < 9:
          want[b, y, x] = image[from_y, 8 - from_x if flips[b] else from_x]
  np.testing.assert_array_equal(transforms.flip_shift(images, flips, shifts), want)


def test_random_flip_shift_draws_every_case_evenly() -> None:
  images = np.zeros((5000, 5, 5, 1), np.uint8)
  images[:, 2, 2], images[:, 2, 1] = 2, 1  # The centre, and what lies left of it.
  moved = transforms.random_flip_shift(images, [np.random.default_rng(i) for i in range(5000)])
  centres = np.argwhere(moved[..., 0] == 2)
  counts = np.zeros((5, 5))
  np.add.at(counts, (centres[:, 1], centres[:, 2]), 1)
  assert counts.sum() == 5000  # A shift of two pixels keeps the centre in view.
  assert counts.min() > 140 and counts.max() < 260  # 200 is expected, with a deviation of 14.
  inner = [(b, y, x) for b, y, x in centres if 0 < x < 4]
  flipped = np.mean([moved[b, y, x + 1, 0] == 1 for b, y, x in inner])
  assert 0.46 < flipped < 0.54


def test_crop_box_lies_inside_with_the_drawn_area_and_ratio() -> None:
  rng = np.random.default_rng(0)
  shares = []
  for _ in range(2000):
    top, left, height, width = transforms.random_crop_box((120, 200), rng)
    assert 0 <= top <= 120 - height and 0 <= left <= 200 - width
    assert 0.72 < width / height < 1.39  # 3/4 to 4/3, and the rounding of the sides.
    shares.append(height * width / (120 * 200))
  assert min(shares) < 0.1 and max(shares) > 0.6


@pytest.mark.parametrize(
  ("size", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))]
)
def test_crop_box_of_a_stripe_is_central(
  size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
  # No box of at least half the area has an allowed ratio.
  got = transforms.random_crop_box(size, np.random.default_rng(0), scale=(0.5, 1.0))
  assert got == box


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"interpolation": "cubic"}, "bicubic"),
    ({"crop_pct": 1.5}, "crop_pct"),
    ({"crop_pct": 0.0}, "crop_pct"),
    ({"pad": -1}, "pad"),
  ],
)
def test_impossible_values_are_refused(change: dict[str, object], message: str) -> None:
  with pytest.raises(UserError, match=message):
    preprocess(**({"size": (8, 8)} | change))  # type: ignore[arg-type]
