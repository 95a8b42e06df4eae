"""Every kind of source, and what is said when one is not usable."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tiny

from vitcomp_jax.data import labels, sources
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


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
  assert {record.levelname for record in caplog.records} <= {"WARNING"}
  lines = [record.getMessage() for record in caplog.records]
  assert not any("\n" in line for line in lines)
  return lines


def test_folder_without_images_in_any_class_is_refused(folder: pathlib.Path) -> None:
  for file in (folder / "val").glob("*/?.*"):
    file.unlink()
  with pytest.raises(UserError, match=r"val: expected images in 2 folders of classes \(cat, dog\)"):
    open_source("folder", folder)
  (folder / "val" / "cat" / "0.heic").write_text("")
  with pytest.raises(UserError, match=r"left out 3 files \(.txt 2, .heic 1\), such as .*val/") as e:
    open_source("folder", folder)
  assert "\n" not in str(e.value)


def test_folder_with_an_empty_class_keeps_its_label(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  for name in ("cow", *(f"empty{i}" for i in range(6))):
    (folder / "val" / name / "deep").mkdir(parents=True)
  for file in folder.glob("val/*/notes.txt"):
    file.unlink()
  source = open_source("folder", folder)
  assert source.class_names[:3] == ("cat", "cow", "dog") and len(source.class_names) == 9
  assert [source[i].label for i in range(6)] == [0, 0, 0, 2, 2, 2]
  assert told(caplog) == [
    f"{folder / 'val'}: no images in 7 folders of classes (cow, empty0, empty1, empty2, empty3, "
    "...) of 9"
  ]


def test_folder_takes_files_and_what_looks_like_one(folder: pathlib.Path) -> None:
  (folder / "val" / "cat" / "3.jpg").symlink_to("nowhere")
  (folder / "val" / "cat" / "4.jpg").mkdir()
  (folder / "val" / "5.jpg").mkdir()
  (folder / "val" / "dog" / "6.png").symlink_to(folder / "val" / "cat" / "2.png")
  (folder / "val" / "dog" / "7.png").symlink_to("7.png")
  os.mkfifo(folder / "val" / "dog" / "8.png")
  source = open_source("folder", folder)
  assert source.class_names == ("cat", "dog") and len(source) == 9
  np.testing.assert_array_equal(np.asarray(source[7].image), np.asarray(source[2].image))
  with pytest.raises(sources.CorruptImage, match="val/cat/3.jpg: No such file"):
    source[3]
  with pytest.raises(sources.CorruptImage, match="val/dog/7.png: Too many levels"):
    source[8]


def test_folder_takes_images_at_any_depth_in_the_order_of_torchvision(
  folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
  cat, elsewhere = folder / "val" / "cat", tmp_path_factory.mktemp("elsewhere")
  for place in (cat / "b" / "c", cat / "b.jpg", cat / "b-", cat / "a", elsewhere):
    place.mkdir(parents=True, exist_ok=True)
    for name in ("z.png", "y.png"):
      PIL.Image.new("L", (5, 5)).save(place / name)
  (cat / "link").symlink_to(elsewhere)
  source = sources.FolderSource(str(folder), "val")
  want = []
  for label, name in enumerate(("cat", "dog")):
    # As torchvision's `make_dataset` goes.
    for root, _, names in sorted(os.walk(folder / "val" / name, followlinks=True)):
      want += [((root, n), label) for n in sorted(names) if not n.endswith(".txt")]
  assert source._files == want and len(want) == 16


def test_folder_with_links_back_is_read_once(folder: pathlib.Path) -> None:
  cat, dog = folder / "val" / "cat", folder / "val" / "dog"
  (cat / "self").symlink_to(cat)
  (cat / "up").symlink_to(folder / "val")
  (dog / "deep").mkdir()
  (dog / "deep" / "back").symlink_to(dog)
  assert len(open_source("folder", folder)) == 6
  (dog / "cat").symlink_to(cat)  # Another folder: its images are dogs too.
  source = open_source("folder", folder)
  assert [source[i].label for i in range(len(source))] == [0] * 3 + [1] * 6


def test_folder_tells_in_one_line_what_is_left_out(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  open_source("folder", folder)
  assert told(caplog) == [
    f"{folder / 'val'}: left out 2 files (.txt 2), such as {folder / 'val' / 'cat' / 'notes.txt'}"
  ]
  caplog.clear()
  val = folder / "val"
  for name in (".hidden/9.jpg", "4.JPG/a.png", "4.JPG/b.png", "cat/.DS_Store", "cat/x.HEIC"):
    (val / name).parent.mkdir(exist_ok=True)
    (val / name).write_text("")
  for name in ("cat/y.heic", "dog/x.heic", "README", "8.jpg", "cat/.8.jpg", "cat/drawing.eps"):
    (val / name).write_text("")
  assert len(open_source("folder", folder)) == 6
  assert told(caplog) == [
    f"{val}: left out 13 files (.heic 3, .jpg hidden 2, .png in folders named like images 2, "
    f".txt 2, .eps 1, ...), such as {val / 'cat' / 'x.HEIC'}"
  ]


def test_folder_tells_nothing_where_nothing_is_left_out(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  tiny.plain_folder(tmp_path)
  open_source("folder", tmp_path)
  assert told(caplog) == []


def test_folder_that_cannot_be_read_is_named(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  scandir = os.scandir

  def refuse(path: str) -> object:
    if path.endswith("dog"):
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(UserError, match="val/dog: cannot be read .Permission denied."):
    open_source("folder", folder)


@pytest.mark.parametrize(
  ("order", "names"),
  [
    (None, ("1", "10", "2", "B", "a10", "a9")),
    ("sorted", ("1", "10", "2", "B", "a10", "a9")),
    ("natural", ("1", "2", "10", "a9", "a10", "B")),
  ],
)
def test_folder_orders_classes_as_asked(
  tmp_path: pathlib.Path, order: str | None, names: tuple[str, ...]
) -> None:
  for name in names:
    (tmp_path / "val" / name).mkdir(parents=True)
    PIL.Image.new("L", (4, 4)).save(tmp_path / "val" / name / "0.png")
  source = sources.make_source("folder", str(tmp_path), "val", (1, 1), 0, class_order=order)
  assert source.class_names == names
  assert isinstance(source, sources.FolderSource)
  assert [os.path.basename(file[0]) for file, _ in source._files] == list(names)


def test_natural_order_is_that_of_timm() -> None:
  # What timm 1.0.31's natural_key makes of them.
  names = ["n02", "n1", "10", "9", "", "Z", "b", "A1b10", "a1B9", "a01b8", "1.5", "1.10"]
  want = ("", "1.5", "1.10", "9", "10", "a01b8", "a1B9", "A1b10", "b", "n1", "n02", "Z")
  assert labels.sort_classes(names, "natural") == want
  assert labels.sort_classes(names, "sorted") == tuple(sorted(names))


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


def test_tfds_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # as if it were not installed
  with pytest.raises(UserError, match=r"got 'tiny_shapes'; .* `pip install vitcomp_jax\[tfds\]`"):
    open_source("tiny_shapes", None)


def test_nothing_imports_tensorflow(tfds_dir: pathlib.Path) -> None:
  code = f"""
import sys
from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import loader, transforms
pre = transforms.Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic")
config = DataConfig(name="tiny_shapes", dir={str(tfds_dir)!r})
next(loader.load(config, "train", pre, 0).train_batches(4))
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
