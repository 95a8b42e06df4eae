"""The command that names what is in an image."""

import dataclasses
import gc
import json
import weakref

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest

import vitcomp_jax as vc
from tests.test_api import MINI, mini_plan
from tests.test_main import OTHER
from vitcomp_jax import predict
from vitcomp_jax.data import class_names, sources
from vitcomp_jax.weights import loading


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Three bundled images as files, a plan, and what is no image."""
  folder = tmp_path_factory.mktemp("files")
  source = sources.make_source("bundled", None, "test", (1, 1), 0)
  for i in range(3):
    image = PIL.Image.fromarray(np.squeeze(source[i].image))
    image.save(folder / f"{i}.png")
  (folder / "plan.json").write_text(json.dumps(mini_plan().to_json()))
  (folder / "text.png").write_text("no image")
  return folder


def _predict(*options):
  return predict.main(["predict", *map(str, options)])


def test_the_most_probable_classes_are_printed(files, capsys):
  plan, images = files / "plan.json", [files / f"{i}.png" for i in range(3)]
  maps = files / "maps"
  options = ["--plan", plan, "--weights", "bundled", "--top", "2", "--maps", maps]
  assert _predict(*options, *images) == 0
  lines = capsys.readouterr().out.splitlines()
  model, params = vc.load(MINI, "bundled", plan)
  names = sources.make_source("bundled", None, "test", (1, 1), 0).class_names
  pixels = [PIL.ImageOps.expand(PIL.Image.open(image).convert("RGB"), 1) for image in images]
  normal = (np.stack([np.asarray(p) for p in pixels]) / np.float32(255) - 0.5) / np.float32(0.5)
  logits = np.asarray(vc.apply(model, params, normal.astype(np.float32)), np.float64)
  shares = 100 * np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  for i, image in enumerate(images):
    best = np.argsort(-shares[i])[:2]
    expected = [f"  {shares[i, c]:5.1f} %  {names[c]}" for c in best]
    assert lines[3 * i : 3 * i + 3] == [str(image), *expected]
    map_file = maps / f"{i + 1}_{i}.png"
    assert lines[9 + i] == f"tokens: {map_file}"
    with PIL.Image.open(map_file) as drawn:
      assert drawn.width > 5 * 240


def test_classes_are_the_weights(files, tmp_path, capsys):
  """Names where the weights have some, numbers of as many as they know where they have none."""
  spec = vc.get_spec(MINI)
  _, params = vc.load(MINI, "bundled")
  head = {name: np.asarray(array)[..., :7] for name, array in params["head"].items()}
  loading.save_params(spec, params | {"head": head}, tmp_path / "seven.safetensors")
  options = ["--variant", MINI, "--top", "9", files / "0.png"]
  assert _predict("--weights", tmp_path / "seven.safetensors", *options) == 0
  lines = capsys.readouterr().out.splitlines()[1:]
  assert sorted(line.split("%  ")[1] for line in lines) == [f"class {i}" for i in range(7)]
  named = dataclasses.replace(spec, class_names=tuple("abcdefg"))
  loading.save_params(named, params | {"head": head}, tmp_path / "seven.safetensors")
  assert _predict("--weights", tmp_path / "seven.safetensors", *options) == 0
  lines = capsys.readouterr().out.splitlines()[1:]
  assert sorted(line.split("%  ")[1] for line in lines) == list("abcdefg")


def test_photographs_are_turned_and_deep_files_refused(files, tmp_path, capsys):
  exif = PIL.Image.Exif()
  exif[PIL.ExifTags.Base.Orientation] = 6
  with PIL.Image.open(files / "0.png") as image:
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
  options = ["--weights", "bundled", "--variant", MINI]
  assert _predict(*options, files / "0.png", tmp_path / "turned.png") == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1:6] == lines[7:12]
  with PIL.Image.open(files / "0.png") as image:
    deep = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
  deep.save(tmp_path / "deep.png")
  assert _predict(*options, tmp_path / "deep.png") == 0
  assert capsys.readouterr().out.splitlines()[1:] == lines[1:6]
  PIL.Image.new("F", (9, 9)).save(tmp_path / "float.tif")
  assert _predict(*options, tmp_path / "float.tif") == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "float.tif: mode F has 32 bits" in error


@pytest.mark.parametrize(
  ("of", "options"),
  [
    ("_from_run", ["--workdir", "run"]),
    ("_from_export", ["--exported", "run"]),
    ("_from_weights", ["--weights", "w"]),
  ],
)
def test_every_classifier_turns_photographs(of, options, monkeypatch):
  stored = vc.get_spec(MINI).preprocess
  assert not stored.exif_orientation
  found = predict.Classifier(lambda images: images, stored, ["one"])
  monkeypatch.setattr(predict, of, lambda *_: found)
  pre = predict._classifier(predict._parse([*options, "image.png"])).preprocess
  assert pre == dataclasses.replace(stored, exif_orientation=True)


def test_no_decoded_file_is_held_longer_than_needed(files, monkeypatch):
  held = []

  def decode(content, what):
    gc.collect()
    assert not any(image() for image in held)
    image = sources_decode(content, what)
    held.append(weakref.ref(image))
    return image

  sources_decode = sources.decode
  monkeypatch.setattr(sources, "decode", decode)
  images = [files / f"{i}.png" for i in range(3)]
  assert _predict("--weights", "bundled", "--variant", MINI, *images) == 0
  assert len(held) == 3


def test_names_of_imagenet():
  names = class_names.guess(1000)
  assert len(set(names)) > 990 and names[0] == "tench, Tinca tinca"
  assert names[999].startswith("toilet tissue")
  assert class_names.readable(["n01440764", "cat"]) == ("tench, Tinca tinca", "cat")
  assert class_names.guess(2) == ("class 0", "class 1")


@pytest.mark.parametrize(
  ("options", "image", "said"),
  [
    (["--weights", "bundled", "--variant", MINI], "no.png", "no.png: expected an image file"),
    (["--weights", "bundled", "--variant", MINI], "text.png", "text.png: not an image"),
    (["--variant", MINI], "0.png", "expected --weights, or --workdir, or --exported"),
    (["--weights", "bundled", "--plan", "nowhere.json"], "0.png", "expected a file or a published"),
    (["--weights", OTHER, "--variant", MINI], "0.png", "do not fit"),
    (["--variant", MINI, "--exported", "somewhere"], "0.png", "expected one of --workdir"),
    (
      ["--exported", "nowhere"],
      "0.png",
      "expected an export's folder or a file in it, got none",
    ),
    (["--workdir", "nowhere"], "0.png", "expected the workdir of a run"),
    (["--weights", "bundled", "--variant", MINI, "--top", "0"], "0.png", "--top"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(options, image, said, files, capsys):
  assert _predict(*options, files / image) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and error.startswith("vitcomp_jax: ") and said in error, error
