"""Tiny data sets for the tests."""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

with tfds.core.registered.skip_registration():

  class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Ten training and four validation images, 6x8 gray; image i is filled with i."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for the metadata of its own data sets beside the module.
    pkg_dir_path = pathlib.Path(__file__).parent

    def _info(self) -> tfds.core.DatasetInfo:
      features = {
        "image": tfds.features.Image(shape=(6, 8, 1)),
        "label": tfds.features.ClassLabel(names=["round", "square", "star"]),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Any]]:
      return {"train": self._generate_examples(10), "validation": self._generate_examples(4)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
      for i in range(count):
        image = PIL.Image.fromarray(np.full((6, 8), i, np.uint8))
        yield i, {"image": image, "label": i % 3}

  class TinyPlain(TinyShapes):
    """The same images without labels."""

    def _info(self) -> tfds.core.DatasetInfo:
      features = {"image": tfds.features.Image(shape=(6, 8, 1))}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
      for i, example in super()._generate_examples(count):
        yield i, {"image": example["image"]}


def prepare(directory: pathlib.Path) -> None:
  """Writes `tiny_shapes` and `tiny_plain` as ArrayRecord."""
  for builder in (TinyShapes, TinyPlain):
    builder(data_dir=directory, file_format="array_record").download_and_prepare()
  assert "tensorflow" not in sys.modules


def folder(directory: pathlib.Path, splits: tuple[str, ...] = ("train", "val")) -> None:
  """Writes two classes of three images each per split, with different suffixes and sizes."""
  for split in splits:
    for c, class_name in enumerate(("cat", "dog")):
      place = directory / split / class_name
      place.mkdir(parents=True)
      for i, suffix in enumerate((".jpg", ".JPEG", ".png")):
        image = np.full((20 + i, 30, 3), 100 * c + 10 * i, np.uint8)
        PIL.Image.fromarray(image).save(place / f"{i}{suffix}")
      (place / "notes.txt").write_text("not an image")


def plain_folder(directory: pathlib.Path, splits: tuple[str, ...] = ("train", "val")) -> None:
  """Writes three images per split, without class folders."""
  for split in splits:
    (directory / split).mkdir(parents=True)
    for i in range(3):
      image = np.full((20, 30, 3), 10 * i, np.uint8)
      PIL.Image.fromarray(image).save(directory / split / f"{i}.png")


def truncate(file: pathlib.Path) -> None:
  """Cuts a file in the middle."""
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2])
