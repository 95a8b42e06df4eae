"""Every kind of source, and what is said when one is not usable."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from vitcomp_jax.data import sources
from vitcomp_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def open_source(
  name: str, directory: pathlib.Path | None = None, split: str | None = None
) -> sources.Source:
  place = None if directory is None else str(directory)
  return sources.make_source(name, place, split, fake_size=(8, 12), fake_classes=5)


@pytest.mark.parametrize(("split", "per_class"), [("train", 500), ("test", 100)])
def test_bundled_is_balanced(split: str, per_class: int) -> None:
  source = open_source("bundled", split=split)
  labels = [source[i].label for i in range(len(source))]
  np.testing.assert_array_equal(np.bincount(labels), [per_class] * 10)
  assert source.class_names[9] == "Ankle boot" and source.image_shape == (28, 28)
  assert labels[:20] != sorted(labels[:20])


def test_bundled_evaluates_on_test() -> None:
  assert open_source("bundled").split == "test"


def test_the_licence_of_the_bundled_images_lies_beside_them() -> None:
  text = (ROOT / "vitcomp_jax/data/bundled/LICENSE.fashion-mnist.txt").read_text()
  assert "Copyright © 2017 Zalando SE, https://tech.zalando.com" in text


def test_fake_is_the_same_for_the_same_index() -> None:
  train, evaluation = open_source("fake", split="train"), open_source("fake")
  assert (len(train), len(evaluation), evaluation.split) == (1280, 256, "validation")
  first, again = train[7], open_source("fake", split="train")[7]
  np.testing.assert_array_equal(np.asarray(first.image), np.asarray(again.image))
  assert first.label == again.label and np.asarray(first.image).shape == (8, 12, 3)
  for other in (train[8], evaluation[7]):
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))
  assert {train[i].label for i in range(100)} == set(range(5))


def test_folder_sorts_classes_and_takes_images_of_any_suffix(folder: pathlib.Path) -> None:
  source = open_source("folder", folder, "train")
  assert source.class_names == ("cat", "dog")
  assert [source[i].label for i in range(len(source))] == [0, 0, 0, 1, 1, 1]
  pixel = np.asarray(source[4].image)[0, 0, 0]
  assert abs(int(pixel) - 110) <= 2  # JPEG.


@pytest.mark.parametrize("split", sources.EVAL_SPLITS)
def test_folder_finds_the_evaluation_split(tmp_path: pathlib.Path, split: str) -> None:
  tiny.folder(tmp_path, ("train", split))
  assert open_source("folder", tmp_path).split == split


def test_folder_without_directory_is_refused() -> None:
  with pytest.raises(UserError, match="config.data.dir"):
    open_source("folder")


def test_folder_that_is_missing_is_refused(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match="expected a folder with train/ and val/, got .*nowhere"):
    open_source("folder", tmp_path / "nowhere")


def test_folder_without_the_split_is_refused(tmp_path: pathlib.Path) -> None:
  tiny.folder(tmp_path, ("train",))
  with pytest.raises(UserError, match="validation or val or test, got only train"):
    open_source("folder", tmp_path)
  with pytest.raises(UserError, match="'val', got only train"):
    open_source("folder", tmp_path, "val")


def test_folder_without_classes_is_refused(tmp_path: pathlib.Path) -> None:
  (tmp_path / "val").mkdir()
  with pytest.raises(UserError, match="one folder per class, got none"):
    open_source("folder", tmp_path)


def test_folder_with_an_empty_class_is_refused(folder: pathlib.Path) -> None:
  for split in ("train", "val"):
    (folder / split / "eel").mkdir()
  with pytest.raises(UserError, match="val/eel: expected images .* got none"):
    open_source("folder", folder)


def test_folder_takes_only_files(folder: pathlib.Path) -> None:
  (folder / "val" / "cat" / "3.jpg").symlink_to("nowhere")
  (folder / "val" / "cat" / "4.jpg").mkdir()
  (folder / "val" / "5.jpg").mkdir()
  (folder / "val" / "dog" / "6.png").symlink_to(folder / "val" / "cat" / "2.png")
  source = open_source("folder", folder)
  assert source.class_names == ("cat", "dog") and len(source) == 7
  np.testing.assert_array_equal(np.asarray(source[6].image), np.asarray(source[2].image))


def test_folder_without_class_folders_has_no_labels(tmp_path: pathlib.Path) -> None:
  tiny.plain_folder(tmp_path)
  source = open_source("folder", tmp_path)
  assert source.class_names == () and len(source) == 3
  assert [source[i].label for i in range(3)] == [-1] * 3
  assert [int(np.asarray(source[i].image)[0, 0, 0]) for i in range(3)] == [0, 10, 20]


def test_only_one_split_may_have_labels(tmp_path: pathlib.Path) -> None:
  tiny.plain_folder(tmp_path, ("train",))
  tiny.folder(tmp_path, ("val",))
  assert open_source("folder", tmp_path, "train").class_names == ()
  assert open_source("folder", tmp_path, "val").class_names == ("cat", "dog")


@pytest.mark.parametrize("split", ["train", "val"])
def test_folder_with_differing_classes_is_refused(folder: pathlib.Path, split: str) -> None:
  (folder / "val" / "dog").rename(folder / "val" / "wolf")
  with pytest.raises(UserError, match=r"2 in only one of them \(dog, wolf\)"):
    open_source("folder", folder, split)


def test_truncated_image_is_named(folder: pathlib.Path) -> None:
  file = folder / "val" / "cat" / "0.jpg"
  tiny.truncate(file)
  with pytest.raises(sources.CorruptImage, match=str(file)):
    open_source("folder", folder)[0]


def test_image_that_is_gone_is_named(folder: pathlib.Path) -> None:
  source = open_source("folder", folder)
  file = folder / "val" / "cat" / "0.jpg"
  file.unlink()
  with pytest.raises(sources.CorruptImage, match=f"{file}: No such file"):
    source[0]
  assert isinstance(sources.read(source, [0])[0], sources.CorruptImage)


def test_tfds_without_labels(tfds_dir: pathlib.Path) -> None:
  source = open_source("tiny_plain", tfds_dir)
  assert source.class_names == () and len(source) == 4
  found = [source[0], *sources.read(source, range(4))]
  assert [example.label for example in found if isinstance(example, sources.Example)] == [-1] * 5


def test_tfds_reads_array_record(tfds_dir: pathlib.Path) -> None:
  source = open_source("tiny_shapes", tfds_dir, "train")
  assert (source.name, source.class_names) == ("tiny_shapes", ("round", "square", "star"))
  assert source.image_shape == (6, 8)
  found = sources.read(source, range(10))
  values = []
  for i, example in enumerate(found):
    assert isinstance(example, sources.Example)
    image = np.asarray(example.image)
    np.testing.assert_array_equal(image, np.asarray(source[i].image))
    assert image.shape == (6, 8) and example.label == source[i].label == image[0, 0] % 3
    values.append(int(image[0, 0]))
  assert sorted(values) == list(range(10))


def test_tfds_slices_splits(tfds_dir: pathlib.Path) -> None:
  parts = [open_source("tiny_shapes", tfds_dir, s) for s in ("train[:70%]", "train[70%:]")]
  assert [len(part) for part in parts] == [7, 3]
  values = {int(np.asarray(part[i].image)[0, 0]) for part in parts for i in range(len(part))}
  assert values == set(range(10))


def test_tfds_finds_the_evaluation_split(tfds_dir: pathlib.Path) -> None:
  assert open_source("tiny_shapes", tfds_dir).split == "validation"


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("nope", "expected a split 'nope', got only train, validation"),
    ("train[:50", "got 'train.:50'"),
    ("train[5:200]", "incompatible with 10 examples"),
  ],
)
def test_tfds_split_that_is_missing_is_refused(
  tfds_dir: pathlib.Path, split: str, message: str
) -> None:
  with pytest.raises(UserError, match=message) as caught:
    open_source("tiny_shapes", tfds_dir, split)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("imagenet2012", "tfds build imagenet2012 --file_format=array_record --data_dir"),
    ("fashion_mnist", "python tools/prepare_fashion_mnist.py --data_dir"),
    ("no_such_set", "bundled, folder, fake or a TFDS name, got 'no_such_set'"),
    ("no such set", "got 'no such set'"),
  ],
)
def test_tfds_set_that_is_not_prepared_is_refused(
  tmp_path: pathlib.Path, name: str, message: str
) -> None:
  with pytest.raises(UserError, match=message) as caught:
    open_source(name, tmp_path)
  assert "\n" not in str(caught.value)


def test_tfds_set_in_tfrecord_form_is_refused(
  tfds_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  shutil.copytree(tfds_dir / "tiny_shapes", tmp_path / "tiny_shapes")
  place = tmp_path / "tiny_shapes" / "1.0.0"
  for file in place.glob("*array_record*"):
    file.rename(place / file.name.replace("array_record", "tfrecord"))
  info = json.loads((place / "dataset_info.json").read_text())
  (place / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
  with pytest.raises(UserError, match="got tfrecord; run `tfds build tiny_shapes --file_format="):
    open_source("tiny_shapes", tmp_path)


def test_nothing_imports_tensorflow(tfds_dir: pathlib.Path) -> None:
  code = f"""
import sys
from vitcomp_jax.config import DataConfig
from vitcomp_jax import data
pre = data.Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic")
config = DataConfig(name="tiny_shapes", dir={str(tfds_dir)!r})
next(data.load(config, "train", pre, 0).train_batches(4))
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
