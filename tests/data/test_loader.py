"""The order of the batches, their completeness, and corrupt images."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
import tiny

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import loader, sources, transforms
from vitcomp_jax.data.dataset import Dataset
from vitcomp_jax.errors import UserError

Batch = dict[str, np.ndarray]


def open_set(split: str, seed: int = 0, size: int = 16, **config: Any) -> Dataset:
  pre = transforms.Preprocess((size, size), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
  return loader.load(DataConfig(**config), split, pre, seed, fake_classes=7)


def take(dataset: Dataset, count: int, batch_size: int, start: int = 0) -> list[Batch]:
  return list(itertools.islice(dataset.train_batches(batch_size, start), count))


def assert_same(got: list[Batch], want: list[Batch]) -> None:
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


# In memory and decoded one by one; with every augmentation.
KINDS = [("bundled", "none"), ("bundled", "flip_shift"), ("fake", "none"), ("fake", "crop_flip")]
KINDS += [("fake", "rand_augment")]
MIXED = {"erase": 0.5, "mixup": 0.8, "cutmix": 1.0, "repeats": 3}


@pytest.mark.parametrize(("name", "augment"), KINDS)
def test_resumed_run_sees_the_same_batches(name: str, augment: str) -> None:
  options: dict[str, Any] = {"name": name, "augment": augment, "train_examples": 50, **MIXED}
  whole = take(open_set("train", **options), 12, batch_size=16)
  for start in (0, 1, 3, 7, 11):
    resumed = take(open_set("train", **options), 12 - start, batch_size=16, start=start)
    assert_same(resumed, whole[start:])


@pytest.mark.parametrize("augment", ["none", "flip_shift", "rand_augment"])
def test_processes_make_the_rows_of_one_batch(augment: str) -> None:
  options: dict[str, Any] = {"name": "fake", "augment": augment, "train_examples": 50, **MIXED}
  whole = take(open_set("train", **options), 3, 16)
  dataset = open_set("train", **options)
  for rows in (slice(0, 8), slice(8, 12), slice(12, 16)):
    part = list(itertools.islice(dataset.train_batches(16, rows=rows), 3))
    assert_same(part, [{key: value[rows] for key, value in batch.items()} for batch in whole])
  evaluation = open_set("eval", name="fake", eval_examples=21)
  parts = [evaluation.eval_batches(16, slice(i, i + 8)) for i in (0, 8)]
  for one, two, both in zip(*parts, evaluation.eval_batches(16), strict=True):
    joined = {key: np.concatenate([one[key], two[key]]) for key in both}
    assert_same([joined], [both])


@pytest.mark.parametrize("batch_size", [12, 16])
def test_repeated_augmentation_shows_a_third_of_the_images_three_times(batch_size: int) -> None:
  dataset = open_set("train", name="fake", augment="crop_flip", train_examples=48, repeats=3)
  batches = take(dataset, 2 * 48 // batch_size, batch_size)
  for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
    shown = np.concatenate([batch["index"] for batch in epoch])
    _, counts = np.unique(shown, return_counts=True)
    assert list(counts) == [3] * 16
  batch = batches[0]
  assert (batch["index"][::2] != batch["index"][1::2]).all()  # Rows mix with their neighbours.
  copies = batch["image"][batch["index"] == batch["index"][0]]
  assert len(copies) == 3 and not np.array_equal(copies[0], copies[1])


def test_number_of_threads_does_not_change_the_batches() -> None:
  sets = [open_set("train", name="fake", augment="crop_flip", workers=w) for w in (1, 3)]
  assert_same(take(sets[0], 6, 8), take(sets[1], 6, 8))


@pytest.mark.parametrize("augment", ["none", "flip_shift", "crop_flip"])
def test_seed_and_epoch_change_the_order(augment: str) -> None:
  options: dict[str, Any] = {"name": "fake", "augment": augment, "train_examples": 32}
  first, second = take(open_set("train", **options), 2, 32)
  other = take(open_set("train", seed=1, **options), 1, 32)[0]
  assert not np.array_equal(first["index"], second["index"])
  assert sorted(first["index"]) == sorted(second["index"])
  assert not np.array_equal(first["index"], other["index"])


def test_seeds_that_follow_each_other_share_no_epoch() -> None:
  epochs = [take(open_set("train", seed=s, name="bundled"), 3, 5000) for s in (0, 1)]
  orders = {tuple(batch["index"]) for run in epochs for batch in run}
  assert len(orders) == 6


@pytest.mark.parametrize("batch_size", [1, 7, 20, 21, 64])
def test_an_epoch_holds_every_example_once(batch_size: int) -> None:
  dataset = open_set("train", name="fake", train_examples=21)
  batches = take(dataset, -(-21 * 4 // batch_size), batch_size)
  assert all(len(batch["index"]) == batch_size for batch in batches)
  seen = np.concatenate([batch["index"] for batch in batches])
  for epoch in range(4):
    assert len(set(seen[21 * epoch : 21 * (epoch + 1)])) == 21


def test_train_batch_holds_the_examples_it_names() -> None:
  dataset = open_set("train", name="bundled", size=30, pad=1)
  batch = take(dataset, 1, 9)[0]
  assert {key: value.dtype.name for key, value in batch.items()} == {
    "image": "uint8",
    "label": "int32",
    "index": "int64",
  }
  for image, label, index in zip(*batch.values(), strict=True):
    example = dataset._reader.source[int(index)]
    assert example.label == label
    want = np.pad(np.asarray(example.image), 1)
    np.testing.assert_array_equal(image, np.repeat(want[:, :, None], 3, axis=2))


def test_flip_shift_changes_each_batch_in_its_own_way() -> None:
  plain = take(open_set("train", name="bundled", size=28), 3, 64)
  moved = take(open_set("train", name="bundled", size=28, augment="flip_shift"), 3, 64)
  ways = []
  for a, b in zip(plain, moved, strict=True):
    np.testing.assert_array_equal(a["index"], b["index"])
    same = (a["image"] == b["image"]).all(axis=(1, 2, 3))
    assert same.mean() < 0.3
    ways.append(tuple(same))
  assert len(set(ways)) == 3


def test_evaluation_is_never_augmented() -> None:
  batches = [
    next(open_set("eval", name="bundled", augment=augment).eval_batches(8))
    for augment in transforms.AUGMENTS
  ]
  assert_same(batches[1:], batches[:1] * (len(batches) - 1))


@pytest.mark.parametrize("name", ["bundled", "fake"])
@pytest.mark.parametrize("batch_size", [1, 7, 30, 45, 64])
def test_evaluation_covers_every_example_once(name: str, batch_size: int) -> None:
  dataset = open_set("eval", name=name, eval_examples=45)
  batches = list(dataset.eval_batches(batch_size))
  assert len(batches) == -(-45 // batch_size)
  assert all(len(value) == batch_size for batch in batches for value in batch.values())
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  real = joined["mask"] == 1
  assert joined["mask"].dtype == np.float32 and real[:45].all() and not real[45:].any()
  assert (joined["index"][:45] == dataset._reader.indices).all() and (
    joined["index"][45:] == -1
  ).all()
  assert not joined["image"][45:].any() and not joined["label"][45:].any()
  for i in range(45):
    example = dataset._reader.source[int(joined["index"][i])]
    want = transforms.evaluation_image(example.image, dataset.pre)
    np.testing.assert_array_equal(joined["image"][i], want)
    assert joined["label"][i] == example.label


def test_subset_is_drawn_by_the_seed() -> None:
  drawn = [
    open_set("eval", seed=seed, name="bundled", eval_examples=100)._reader.indices
    for seed in (0, 0, 1)
  ]
  assert len(set(drawn[0])) == 100
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert not np.array_equal(drawn[0], drawn[2])


def test_sample_is_spread_evenly() -> None:
  dataset = open_set("eval", name="bundled")
  batch = dataset.sample(4)
  np.testing.assert_array_equal(batch["index"], [0, 250, 500, 750])
  assert batch["image"].shape == (4, 16, 16, 3)
  assert len(open_set("eval", name="bundled", eval_examples=3).sample(8)["index"]) == 3


def test_tfds_is_read_into_memory(tfds_dir: pathlib.Path) -> None:
  dataset = open_set("train", name="tiny_shapes", dir=str(tfds_dir), size=6)
  assert (dataset.num_examples, dataset.num_classes) == (10, 3)
  batch = take(dataset, 1, 10)[0]
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 3, batch["label"])
  assert dataset._reader.memory is not None


def test_config_goes_before_the_variant() -> None:
  dataset = open_set("eval", name="bundled", pad=2, crop_pct=0.8)
  assert (dataset.pre.pad, dataset.pre.crop_pct) == (2, 0.8)


def test_corrupt_image_stops(folder: pathlib.Path) -> None:
  file = folder / "val" / "dog" / "1.JPEG"
  tiny.truncate(file)
  dataset = open_set("eval", name="folder", dir=str(folder))
  with pytest.raises(UserError, match=f"Corrupt image: {file}: .*config.data.on_error=skip"):
    list(dataset.eval_batches(4))


def test_corrupt_image_is_left_out_of_evaluation(folder: pathlib.Path) -> None:
  tiny.truncate(folder / "val" / "dog" / "1.JPEG")
  dataset = open_set("eval", name="folder", dir=str(folder), on_error="skip")
  assert dataset.skipped == 0
  for _ in range(2):
    batches = list(dataset.eval_batches(4))
    masks = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(masks, [1, 1, 1, 1, 0, 1, 0, 0])
    assert dataset.skipped == 1


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_corrupt_image_is_replaced_in_training(folder: pathlib.Path, augment: str) -> None:
  tiny.truncate(folder / "train" / "cat" / "0.jpg")
  tiny.truncate(folder / "train" / "dog" / "2.png")
  options: dict[str, Any] = {
    "name": "folder",
    "dir": str(folder),
    "on_error": "skip",
    "augment": augment,
  }
  dataset = open_set("train", **options)
  batches = take(dataset, 4, 6)
  for batch in batches:
    assert sorted(batch["index"]) == [1, 1, 1, 2, 3, 4]  # 1 stands for 0, and for 5 and 0.
    np.testing.assert_array_equal(batch["label"], batch["index"] // 3)
  assert dataset.skipped == 2
  assert_same(take(open_set("train", **options), 2, 6, start=2), batches[2:])


def test_only_corrupt_images_are_an_error(folder: pathlib.Path) -> None:
  for file in (folder / "train").glob("*/?.*"):
    tiny.truncate(file)
  dataset = open_set("train", name="folder", dir=str(folder), on_error="skip")
  with pytest.raises(UserError, match="got only corrupt ones"):
    take(dataset, 1, 2)


@pytest.mark.parametrize("name", ["folder", "tiny_shapes"])
def test_only_corrupt_images_end_an_evaluation(
  name: str, folder: pathlib.Path, tfds_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def corrupt(content: bytes, what: str) -> None:
    raise sources.CorruptImage(what)

  monkeypatch.setattr(sources, "decode", corrupt)
  place = folder if name == "folder" else tfds_dir
  dataset = open_set("eval", name=name, dir=str(place), on_error="skip")
  with pytest.raises(UserError, match="got only corrupt ones"):
    list(dataset.eval_batches(4))
  with pytest.raises(UserError, match="got only corrupt ones"):
    dataset.sample(2)


def test_image_that_cannot_be_read_counts_as_corrupt(folder: pathlib.Path) -> None:
  dataset = open_set("eval", name="folder", dir=str(folder), on_error="skip")
  (folder / "val" / "cat" / "1.JPEG").unlink()
  masks = np.concatenate([batch["mask"] for batch in dataset.eval_batches(6)])
  np.testing.assert_array_equal(masks, [1, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["folder", "tiny_plain"])
def test_images_without_labels(name: str, tmp_path: pathlib.Path, tfds_dir: pathlib.Path) -> None:
  tiny.plain_folder(tmp_path)
  place = tmp_path if name == "folder" else tfds_dir
  for split in ("train", "eval"):
    dataset = open_set(split, name=name, dir=str(place))
    assert not dataset.has_labels and dataset.num_classes == 0 and dataset.class_names == ()
  np.testing.assert_array_equal(take(dataset, 1, 5)[0]["label"], [-1] * 5)
  batch = next(dataset.eval_batches(3))
  assert (batch["label"] == -1).all() and batch["mask"].all()
  assert (dataset.sample(2)["label"] == -1).all()
  assert open_set("eval", name="fake").has_labels


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"augment": "mixup"}, "config.data.augment: .*'mixup'"),
    ({"on_error": "ignore"}, "config.data.on_error: .*'ignore'"),
    ({"crop_pct": 0.0}, "config.data.crop_pct: .* got 0.0"),
    ({"workers": 0}, "config.data.workers: expected at least 1, got 0"),
    ({"train_examples": 5001}, "config.data.train_examples: expected 1 to 5000"),
    ({"train_examples": 0}, "config.data.train_examples: expected 1 to 5000"),
    ({"train_split": "validation"}, "bundled: expected a split 'validation', got only train, test"),
  ],
)
def test_impossible_values_are_refused(config: dict[str, Any], message: str) -> None:
  with pytest.raises(UserError, match=message):
    open_set("train", **config)


def test_batch_size_must_be_positive() -> None:
  with pytest.raises(UserError, match="batch_size: expected at least 1, got 0"):
    open_set("train").train_batches(0)
