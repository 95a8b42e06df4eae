"""Whatever an image file holds, it is the picture that a viewer shows, or refused by its name."""

import io
import pathlib
import subprocess
import sys

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest
import tiny

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import images, loader, sources, transforms
from vitcomp_jax.errors import UserError

DEEP = ["I;16", "I;16B", "I;16L", "I;16N"]


def preprocess(**options: object) -> transforms.Preprocess:
  fields = {"image_size": (8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
  return transforms.Preprocess(**{**fields, "interpolation": "bicubic", **options})  # type: ignore[arg-type]


def content(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def deep(shape: tuple[int, int] = (8, 8)) -> np.ndarray:
  return np.random.default_rng(0).integers(2**16, size=shape, dtype=np.uint16)


def turned(orientation: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
  """An image file of 12 x 8 pixels with EXIF's orientation."""
  pixels = np.random.default_rng(1).integers(256, size=(8, 12, 3), dtype=np.uint8)
  exif = PIL.Image.Exif()
  exif[PIL.ExifTags.Base.Orientation] = orientation
  return content(PIL.Image.fromarray(pixels).convert(mode), kind, exif=exif)


@pytest.mark.parametrize("mode", DEEP)
def test_16_bits_become_their_high_byte(mode: str) -> None:
  pixels = deep()
  stored = pixels.astype(">u2" if mode == "I;16B" else "<u2")
  got = images.to_rgb(PIL.Image.frombytes(mode, (8, 8), stored.tobytes()))
  np.testing.assert_array_equal(np.asarray(got), np.repeat(pixels[:, :, None] >> 8, 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_files_of_16_bits_are_as_colours_of_16_bits(kind: str) -> None:
  image = images.decode(content(PIL.Image.fromarray(deep()), kind), "deep")
  assert image.mode.startswith("I;16")
  got = transforms.evaluation_image(image, preprocess())
  np.testing.assert_array_equal(got, np.repeat(deep()[:, :, None] >> 8, 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_as_pillow_converts_them(mode: str) -> None:
  size = len(PIL.Image.new(mode, (6, 4)).tobytes())
  data = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8).tobytes()
  image = PIL.Image.frombytes(mode, (6, 4), data)
  want = np.asarray(image.convert("RGB"))
  np.testing.assert_array_equal(np.asarray(images.to_rgb(image)), want)


@pytest.mark.parametrize(
  ("mode", "said"),
  [
    *(("I", r"has 32 bits per channel of no known range \(convert it to 8 bits\)"),),
    *(("F", "has 32 bits per channel"), ("La", r"does not become RGB \(conversion from")),
  ],
)
def test_an_image_that_has_no_range_is_refused(mode: str, said: str) -> None:
  with pytest.raises(UserError, match=f"image: mode {mode} {said}") as caught:
    transforms.evaluation_image(PIL.Image.new(mode, (9, 9)), preprocess())
  assert isinstance(caught.value, images.CorruptImage) and "\n" not in str(caught.value)
  with pytest.raises(images.CorruptImage):
    transforms.random_crop_flip(PIL.Image.new(mode, (9, 9)), preprocess(), np.random.default_rng(0))


@pytest.mark.parametrize("shape", [(4, 4, 5), (2, 4, 4, 3)])
def test_an_array_that_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
  with pytest.raises(UserError, match="image: expected uint8.h w. or uint8.h w 3., got uint8."):
    images.to_rgb(np.zeros(shape, np.uint8))
  with pytest.raises(UserError, match="image: mode F has 32 bits|expected uint8.h w., got float32"):
    images.to_rgb(np.zeros((4, 4), np.float32))


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_deep_file_is_named_and_can_be_skipped(
  folder: pathlib.Path, mode: str, augment: str
) -> None:
  file = folder / "train" / "cat" / "0.tif"
  PIL.Image.new(mode, (9, 9)).save(file)
  options = {"name": "folder", "dir": str(folder), "augment": augment}
  stopping = loader.load(DataConfig(**options), "train", preprocess(), 0)
  with pytest.raises(UserError, match=f"Corrupt image: {file}: mode {mode} has 32 bits") as caught:
    next(stopping.train_batches(7))
  assert "\n" not in str(caught.value)
  skipping = loader.load(DataConfig(**options, on_error="skip"), "train", preprocess(), 0)
  next(skipping.train_batches(7))
  assert skipping.skipped == 1


def test_a_deep_record_is_named(tfds_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  records = [{"image": content(PIL.Image.new("F", (9, 9)), "TIFF"), "label": 0}] * 4
  monkeypatch.setattr(
    sources.TfdsSource,
    "read",
    lambda self, indices: [self._example(records[i], i) for i in indices],
  )
  dataset = loader.load(DataConfig(name="tiny_plain", dir=str(tfds_dir)), "eval", preprocess(), 0)
  said = "Corrupt image: tiny_plain, split validation, image 0: mode F has 32 bits"
  with pytest.raises(UserError, match=said):
    list(dataset.eval_batches(4))


def test_an_open_file_that_ends_early_is_named(folder: pathlib.Path) -> None:
  file = folder / "val" / "cat" / "2.png"
  tiny.truncate(file)
  with PIL.Image.open(file) as image, pytest.raises(images.CorruptImage, match=f"^{file}: "):
    images.to_rgb(image)


def test_a_deep_image_in_memory_can_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
  def read(source: sources.Source, indices: list[int]) -> list[sources.Example]:
    image = PIL.Image.new("F", (28, 28))
    return [sources.Example(image if i == 0 else source[i].image, 0) for i in indices]

  monkeypatch.setattr(sources, "read", read)
  dataset = loader.load(DataConfig(name="bundled", on_error="skip"), "eval", preprocess(), 0)
  batches = list(dataset.eval_batches(1000))
  assert dataset.skipped == 1 and batches[0]["mask"].sum() == 999


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_turns_where_it_is_asked_for(orientation: int, kind: str) -> None:
  stored = PIL.Image.open(io.BytesIO(turned(orientation, kind)))
  want = PIL.ImageOps.exif_transpose(stored)
  image = images.decode(turned(orientation, kind), "photo")
  np.testing.assert_array_equal(
    np.asarray(images.to_rgb(image, exif_orientation=True)), np.asarray(want)
  )
  np.testing.assert_array_equal(np.asarray(images.to_rgb(image)), np.asarray(stored))


def test_exif_turns_before_the_padding_and_the_crops(folder: pathlib.Path) -> None:
  image = images.decode(turned(6), "photo")
  upright = PIL.ImageOps.exif_transpose(image)
  for on, same in ((True, upright), (False, PIL.Image.fromarray(np.asarray(image)))):
    pre = preprocess(pad=1, exif_orientation=on)
    np.testing.assert_array_equal(
      transforms.evaluation_image(image, pre), transforms.evaluation_image(same, pre)
    )
    crops = [
      transforms.random_crop_flip(picture, pre, np.random.default_rng(3))
      for picture in (image, same)
    ]
    np.testing.assert_array_equal(np.asarray(crops[0]), np.asarray(crops[1]))
  for split in ("train", "val"):
    (folder / split / "cat" / "0.png").write_bytes(turned(6))
  pre = preprocess(exif_orientation=True)
  want = transforms.evaluation_image(upright, pre)
  config = DataConfig(name="folder", dir=str(folder))
  dataset = loader.load(config, "eval", pre, 0)
  shown = [next(dataset.eval_batches(4))["image"], dataset.sample(8)["image"]]
  for batch in shown:
    np.testing.assert_array_equal(batch[1], want)


def test_images_that_are_taken_otherwise_than_viewers_show_them_are_told_once(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  for name in ("0.png", "1.png"):
    (folder / "val" / "cat" / name).write_bytes(turned(6))
  config = DataConfig(name="folder", dir=str(folder))
  for exif_orientation, count in ((True, 0), (False, 1)):
    dataset = loader.load(config, "eval", preprocess(exif_orientation=exif_orientation), 0)
    caplog.clear()
    list(dataset.eval_batches(4))
    assert sum("turned by viewers" in record.getMessage() for record in caplog.records) == count


def test_exif_turns_what_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
  image = images.decode(turned(6), "photo")
  monkeypatch.setattr(
    sources, "read", lambda source, indices: [sources.Example(image, 0) for _ in indices]
  )
  pre = preprocess(exif_orientation=True)
  dataset = loader.load(DataConfig(name="bundled"), "eval", pre, 0)
  assert dataset._reader.memory is not None
  want = transforms.evaluation_image(PIL.ImageOps.exif_transpose(image), pre)
  np.testing.assert_array_equal(next(dataset.eval_batches(2))["image"], [want, want])


def test_exif_that_cannot_be_read_turns_nothing() -> None:
  image = PIL.Image.new("RGB", (4, 3))
  image.info["exif"] = b"Exif\0\0no tags"
  assert images.to_rgb(image, exif_orientation=True).size == (4, 3)


def test_too_many_pixels_are_a_corrupt_image(monkeypatch: pytest.MonkeyPatch) -> None:
  data = content(PIL.Image.new("L", (50, 50)), "PNG")
  monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(images.CorruptImage, match="big.png: too many pixels .*2500 pixels") as caught:
    images.decode(data, "big.png")
  assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_many_pixels_are_no_warning(tmp_path: pathlib.Path) -> None:
  PIL.Image.new("L", (50, 50)).save(tmp_path / "big.png")
  code = """
import pathlib
import PIL.Image
from vitcomp_jax.data import images
PIL.Image.MAX_IMAGE_PIXELS = 2000
assert images.decode(pathlib.Path("big.png").read_bytes(), "big.png").size == (50, 50)
"""
  command = [sys.executable, "-W", "error", "-c", code]
  result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
  assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_may_fail_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*_: object, **__: object) -> None:
    raise IndexError("one\ntwo")

  monkeypatch.setattr(PIL.Image, "open", fail)
  with pytest.raises(images.CorruptImage, match="^x.png: one two$"):
    images.decode(b"", "x.png")


def test_no_program_is_started_for_a_file() -> None:
  with pytest.raises(images.CorruptImage, match="drawing.jpg: not an image"):
    images.decode(content(PIL.Image.new("RGB", (9, 9)), "EPS"), "drawing.jpg")


def test_suffixes_are_those_that_pillow_opens() -> None:
  known = images.suffixes()
  assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"} < known
  assert {".ppm", ".pgm", ".tga", ".mpo", ".jp2"} < known
  assert not known & {
    ".eps",
    ".ps",
    ".pdf",
    ".wmf",
    ".emf",
    ".mpg",
    ".h5",
    ".hdf",
    ".grib",
    ".bufr",
  }


def test_a_file_of_each_suffix_is_read(tmp_path: pathlib.Path) -> None:
  place = tmp_path / "train" / "one"
  place.mkdir(parents=True)
  pixels = PIL.Image.new("RGB", (20, 30), (0, 255, 0))
  for suffix in (".tif", ".TIFF", ".gif", ".jfif", ".ppm", ".tga", ".webp", ".Bmp", ".dib"):
    pixels.save(place / f"x{suffix}")
  source = sources.make_source("folder", str(tmp_path), "train", (1, 1), 0)
  assert len(source) == 9
  for i in range(9):
    red, green, blue = np.asarray(images.to_rgb(source[i].image))[5, 5]
    assert red < 9 and green > 246 and blue < 9


def test_truncated_files_of_all_kinds_are_corrupt(tmp_path: pathlib.Path) -> None:
  for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "ICO", "PCX"):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    file = tmp_path / "file"
    file.write_bytes(content(PIL.Image.fromarray(noise), kind))
    tiny.truncate(file)
    with pytest.raises(images.CorruptImage, match="^file: ") as caught:
      images.decode(file.read_bytes(), "file")
    assert "\n" not in str(caught.value)
