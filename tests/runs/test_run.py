"""Where a run's weights meet its data: classes, numbers of outputs, preprocessing."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import vitcomp_jax as vc
from tests.models import random_params
from vitcomp_jax.config import Config, from_config_dict
from vitcomp_jax.data import class_names, sources
from vitcomp_jax.errors import UserError
from vitcomp_jax.runs.run import Run, open_run
from vitcomp_jax.weights import files, loading

MINI = "vit_mini_patch3_30"
NAMES = sources.make_source("bundled", None, None, (1, 1), 0).class_names
IDS = class_names.imagenet_ids()


def put(folder: pathlib.Path, classes, shade=None) -> pathlib.Path:
  """A class folder for each name, with an image whose shade is a number of its own."""
  for i, name in enumerate(classes):
    (folder / name).mkdir(parents=True)
    pixels = np.full((30, 30, 3), (shade or {}).get(name, i), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / name / "0.png")
  return folder.parent


def config_of(folder: pathlib.Path, weights="bundled", stages=("evaluate",), **groups) -> Config:
  groups = {"model": {}, "data": {}} | groups
  model = {"variant": MINI, "weights": str(weights) if weights else None} | groups.pop("model")
  data = {"name": "folder", "dir": str(folder)} | groups.pop("data")
  return from_config_dict({"stages": stages, "model": model, "data": data, **groups})


def opened(tmp_path: pathlib.Path, config: Config) -> Run:
  return open_run(config, tmp_path / "run")


def begin(run: Run) -> None:
  run.workdir.begin(run.config, run.inputs.class_names)


def labels_of(run: Run, split="eval") -> list[int]:
  data = run.inputs.train_data if split == "train" else run.inputs.eval_data
  (batch,) = data.eval_batches(data.num_examples)
  return batch["label"].tolist()


@pytest.fixture
def unnamed(tmp_path: pathlib.Path) -> pathlib.Path:
  """The bundled weights as other libraries write them: without a word on classes."""
  path = tmp_path / "unnamed.safetensors"
  safetensors.numpy.save_file(files.read(loading.bundled_weights(MINI)), path)
  return path


@pytest.mark.parametrize("classes", [("Sneaker", "Bag", "Coat"), NAMES[1:]])
def test_classes_are_known_by_their_names(classes, tmp_path, caplog):
  run = opened(tmp_path, config_of(put(tmp_path / "data" / "val", classes)))
  assert run.inputs.class_names == NAMES and run.inputs.eval_data.class_names == NAMES
  assert labels_of(run) == [NAMES.index(name) for name in sorted(classes)]
  assert not caplog.records


def test_classes_that_the_weights_do_not_know_are_refused(tmp_path):
  run = opened(tmp_path, config_of(put(tmp_path / "data" / "val", ("Bag", "Hat"))))
  with pytest.raises(UserError, match=r"model's 10 \(T-shirt/top, .*, got 1 others \(Hat\)"):
    run.inputs.check_data("eval")


def test_numbered_folders_are_taken_on_trust_if_all_are_there(tmp_path, caplog):
  digits = [str(i) for i in range(10)]
  run = opened(tmp_path, config_of(put(tmp_path / "data" / "val", digits)))
  assert labels_of(run) == list(range(10)) and run.inputs.class_names == NAMES
  assert len(caplog.records) == 1 and "numbered by their order" in caplog.text


@pytest.mark.parametrize("asked", [{}, {"num_classes": 10}])
def test_a_part_of_numbered_folders_is_refused(asked, tmp_path):
  data = put(tmp_path / "data" / "val", ("3", "5", "7"))
  run = opened(tmp_path, config_of(data, model=asked))
  with pytest.raises(UserError, match=r"expected 10 classes, .* got 3 \(3, 5, 7\)"):
    run.inputs.check_data("eval")


@pytest.mark.parametrize(
  ("order", "expected"), [("sorted", ["1", "10", "2"]), ("natural", ["1", "2", "3"])]
)
def test_the_order_of_folders_can_be_chosen(order, expected, tmp_path, unnamed):
  folders = [str(i) for i in range(1, 11)]
  data = put(tmp_path / "data" / "val", folders)
  run = opened(tmp_path, config_of(data, unnamed, data={"class_order": order}))
  assert list(run.inputs.class_names[:3]) == expected
  (batch,) = run.inputs.eval_data.eval_batches(10)
  shade = {name: i for i, name in enumerate(folders)}
  assert batch["image"][:, 0, 0, 0].tolist() == [shade[name] for name in run.inputs.class_names]
  assert batch["label"].tolist() == list(range(10))


def test_a_file_names_the_outputs(tmp_path, unnamed, caplog):
  data = put(tmp_path / "data" / "val", ("cat", "dog"))
  names = tmp_path / "names.txt"
  names.write_text("\n".join([*(f"other {i}" for i in range(7)), "dog", "fox", "cat"]))
  run = opened(tmp_path, config_of(data, unnamed, data={"classes": str(names)}))
  assert labels_of(run) == [9, 7] and run.inputs.class_names[7] == "dog"
  assert not caplog.records
  names.write_text("cat\ndog\n")
  run = opened(tmp_path, config_of(data, unnamed, data={"classes": str(names)}))
  with pytest.raises(UserError, match="expected 10 names, .* got 2"):
    run.inputs.check_data("eval")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> pathlib.Path:
  """Weights of 1,000 classes without names."""
  spec = dataclasses.replace(vc.get_spec(MINI), num_classes=1000)
  path = tmp_path_factory.mktemp("weights") / "thousand.safetensors"
  files.write(random_params(spec), str(path))
  return path


def test_wordnet_folders_are_imagenets_classes(tmp_path, thousand, caplog):
  found = ("n02102040", "n03417042", "n01440764")
  data = put(tmp_path / "data" / "val", found)
  (data / "val" / "n01443537").mkdir()  # no images: of a part of the validation set
  run = opened(tmp_path, config_of(data, thousand))
  assert labels_of(run) == [0, 217, 569] and run.inputs.class_names == IDS
  assert not [r for r in caplog.records if "order" in r.getMessage()]


def test_both_splits_are_numbered_alike(tmp_path, unnamed):
  train, val = [f"c{i}" for i in range(10)], ["c3", "c7"]
  put(tmp_path / "data" / "training", train)
  data = put(tmp_path / "data" / "holdout", val)
  splits = {"train_split": "training", "eval_split": "holdout"}
  stages = ("search", "evaluate")
  run = opened(tmp_path, config_of(data, unnamed, stages, data=splits))
  assert labels_of(run, "train") == list(range(10)) and labels_of(run) == [3, 7]
  put(tmp_path / "data" / "holdout", ["c11"])
  run = opened(tmp_path, config_of(data, unnamed, stages, data=splits))
  with pytest.raises(UserError, match=r"split holdout: expected .* got 1 others \(c11\)"):
    run.inputs.check_data("eval")


def test_written_weights_carry_names_grid_and_preprocessing(tmp_path, unnamed):
  names = [f"c{i}" for i in range(10)]
  data = put(tmp_path / "data" / "val", names)
  asked = {"mean": (0.1, 0.2, 0.3), "crop_mode": "squash", "exif_orientation": True}
  run = opened(tmp_path, config_of(data, unnamed, data=asked))
  run.artefacts.save(run.artefacts.dense_params, tmp_path / "named.safetensors")
  found = loading.spec_for(MINI, str(tmp_path / "named.safetensors"))
  assert found == run.inputs.spec and found.class_names == tuple(names)
  assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
  assert found.crop_mode == "squash" and found.exif_orientation
  described = files.describe(str(tmp_path / "named.safetensors"))
  assert described.grid == (10, 10) and described.variant == MINI
  # Where they meet data again, the names decide and not the order; a key goes before them.
  other = put(tmp_path / "other" / "val", ["c9", "c0"])
  asked = {"mean": (0.0, 0.0, 0.0), "interpolation": "bilinear"}
  run = opened(tmp_path, config_of(other, tmp_path / "named.safetensors", data=asked))
  assert labels_of(run) == [0, 9]
  assert run.inputs.spec.mean == (0, 0, 0) and run.inputs.preprocess.interpolation == "bilinear"
  assert (
    run.inputs.eval_data.pre == run.inputs.preprocess
    and run.inputs.preprocess.crop_mode == "squash"
  )


def test_a_run_and_its_config_say_the_names(tmp_path):
  run = opened(tmp_path, config_of(put(tmp_path / "data" / "val", ("Bag",))))
  begin(run)
  assert json.loads((tmp_path / "run" / "config.json").read_text())["class_names"] == list(NAMES)


@pytest.mark.parametrize(
  ("classes", "is_fresh", "names"),
  [
    (("Bag", "Coat"), True, ("Bag", "Coat")),  # fewer outputs
    pytest.param(  # other names
      *(tuple(f"c{i}" for i in range(10)), True, tuple(f"c{i}" for i in range(10))),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_head_for_other_classes_is_fresh(classes, is_fresh, names, tmp_path, caplog):
  data = put(tmp_path / "data" / "train", classes)
  put(tmp_path / "data" / "val", classes[:1])
  run = opened(tmp_path, config_of(data, stages=("pretrain",)))
  assert run.inputs.class_names == names and labels_of(run) == [0]
  head = np.asarray(run.artefacts.dense_params["head"]["kernel"])
  assert head.shape == (64, len(classes))
  assert "replaced by a random one" in caplog.text


@pytest.mark.parametrize("weights", ["bundled", None])
def test_a_head_that_is_trained_on_a_part_keeps_the_known_order(weights, tmp_path):
  """What is saved means to others what it meant in training."""
  data = put(tmp_path / "data" / "train", ("Sandal", "Bag"))
  put(tmp_path / "data" / "val", ("Bag",))
  run = opened(tmp_path, config_of(data, weights, stages=("pretrain",), model={"num_classes": 10}))
  places = {"Bag": NAMES.index("Bag"), "Sandal": NAMES.index("Sandal")} if weights else None
  places = places or {"Bag": 0, "Sandal": 1}
  assert labels_of(run, "train") == [places["Bag"], places["Sandal"]]
  assert labels_of(run) == [places["Bag"]]
  run.artefacts.save(run.artefacts.dense_params, tmp_path / "named.safetensors")
  again = open_run(config_of(data, tmp_path / "named.safetensors"), tmp_path / "again")
  assert (
    labels_of(again) == [places["Bag"]] and again.inputs.class_names[places["Sandal"]] == "Sandal"
  )


def test_wordnet_ids_keep_imagenets_places_in_training(tmp_path, thousand):
  data = put(tmp_path / "data" / "train", ("n02102040", "n03417042"))
  put(tmp_path / "data" / "val", ("n03417042",))
  config = config_of(data, thousand, stages=("pretrain",), model={"num_classes": 1000})
  run = opened(tmp_path, config)
  assert labels_of(run, "train") == [217, 569] and labels_of(run) == [569]
  assert run.inputs.class_names == IDS


def test_a_run_goes_on_with_the_classes_that_it_began_with(tmp_path, unnamed):
  data = put(tmp_path / "data" / "train", ("a", "b", "c"))
  put(tmp_path / "data" / "val", ("a", "b", "c"))
  config = config_of(data, unnamed, stages=("pretrain",))
  begin(opened(tmp_path, config))
  begin(opened(tmp_path, config))
  for split in ("train", "val"):
    (data / split / "a").rename(data / split / "z")
  with pytest.raises(UserError, match="was begun with another class 0, a and not b"):
    begin(opened(tmp_path, config))
  for split in ("train", "val"):
    put(data / split, ("a",))
  with pytest.raises(UserError, match="expected at least the 4"):
    begin(opened(tmp_path, config))


def test_a_stage_that_the_config_does_not_name_counts(tmp_path):
  data = put(tmp_path / "data" / "train", ("a", "b"))
  put(tmp_path / "data" / "val", ("b",))
  run = open_run(config_of(data), tmp_path / "run", ("pretrain",))
  assert run.inputs.class_names == ("a", "b") and labels_of(run) == [1]


def test_names_are_asked_for_without_labels_too(tmp_path, unnamed):
  put(tmp_path / "data", ("val",))
  names = tmp_path / "names.txt"
  names.write_text("\n".join(NAMES))
  config = config_of(tmp_path / "data", unnamed, data={"classes": str(names)})
  assert opened(tmp_path, config).inputs.class_names == NAMES
  names.write_text("a\nb")
  with pytest.raises(UserError, match="expected 10 names, .* got 2"):
    _ = opened(tmp_path, config).inputs.class_names


def test_only_folders_have_an_order_to_choose(tmp_path, unnamed, caplog):
  config = from_config_dict({"model": {"variant": MINI, "weights": str(unnamed)}})
  assert opened(tmp_path, config).inputs.class_names == NAMES
  assert "natural order" not in caplog.text and "numbered by their order" in caplog.text


@pytest.mark.parametrize("mean", [(0.5,), (0.1, 0.2, 0.3, 0.4)])
def test_colours_are_three(mean, tmp_path):
  config = config_of(put(tmp_path / "data" / "val", ("Bag",)), data={"mean": mean})
  with pytest.raises(UserError, match=r"config.data.mean: expected three numbers"):
    opened(tmp_path, config).inputs.check_data("eval")


def test_padding_belongs_to_weights(tmp_path):
  data = put(tmp_path / "data" / "val", ("Bag",))
  assert opened(tmp_path, config_of(data)).inputs.preprocess.pad == 1  # the bundled weights'
  assert opened(tmp_path, config_of(data, data={"pad": 0})).inputs.eval_data.pre.pad == 0


def test_a_head_for_the_same_classes_stays_in_its_order(tmp_path, unnamed, caplog):
  names = [f"c{i}" for i in range(10)]
  spec = dataclasses.replace(vc.get_spec(MINI), class_names=tuple(reversed(names)))
  params = vc.load(MINI, unnamed)[1]
  loading.save_params(spec, params, tmp_path / "named.safetensors")
  data = put(tmp_path / "data" / "train", names)
  run = opened(tmp_path, config_of(data, tmp_path / "named.safetensors", stages=("pretrain",)))
  assert labels_of(run, "train") == list(range(9, -1, -1))
  jax.tree.map(np.testing.assert_array_equal, run.artefacts.dense_params, params)
  assert not caplog.records


def test_more_folders_than_outputs_are_refused(tmp_path):
  data = put(tmp_path / "data" / "val", NAMES[1:])
  run = opened(tmp_path, config_of(data, None, model={"num_classes": 5}))
  with pytest.raises(UserError, match="expected at least the 9 of folder, got 5"):
    run.inputs.check_data("eval")


def test_weights_of_a_look_alike_are_refused(tmp_path):
  clip = "vit_base_patch32_clip_quickgelu_224"
  spec = dataclasses.replace(vc.get_spec(clip), width=48, depth=1, mlp_dim=32)
  path = tmp_path / "w.safetensors"
  loading.save_params(spec, random_params(spec), path)
  with pytest.raises(UserError, match=r"activation gelu\), got those of .*quickgelu_224 \(quick"):
    loading.spec_for("vit_base_patch32_clip_224", str(path))


def test_the_plan_of_a_search_that_was_killed_is_not_read(tmp_path):
  """A search saves its plan just before it is marked as finished."""
  run = opened(tmp_path, config_of(tmp_path, data={"name": "bundled", "pad": 1}))
  begin(run)
  (run.workdir.path / "plan.json").write_text("{}")
  assert run.artefacts.plan is None
