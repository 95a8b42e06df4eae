"""The tool that draws the token maps of several methods on one photo."""

import numpy as np
import PIL.Image

import vitcomp_jax as vc
from tests.models import random_params
from tests.tiny_main import tiny_spec
from tools import photo_token_maps
from vitcomp_jax.models.build import build

_GMACS = 0.7 * vc.count_cost(build(tiny_spec(), tiny_spec().dense_layers)).gmacs


def test_a_row_for_each_plan_and_a_picture_for_each_layer(tmp_path):
  spec = tiny_spec()
  model = build(spec, spec.dense_layers)
  plans = {"dense": spec.dense_layers, "ToMe": vc.methods.within("tome", spec, _GMACS)}
  image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
  figure = photo_token_maps.drawn(
    model, random_params(spec), plans, image, (1, 3), "Coat", "Photo: nobody."
  )
  assert len(figure.axes) == 6
  texts = [text.get_text() for text in figure.texts]
  assert texts[:3] == ["Coat: dense", "layer 1: 26 tokens", "layer 3: 26 tokens"]
  assert texts[3] == "Coat: ToMe" and texts[5] != texts[2]
  assert texts[-1].endswith("Photo: nobody.")
  photo_token_maps.save(figure, str(tmp_path / "maps.png"))
  with PIL.Image.open(tmp_path / "maps.png") as picture:
    assert picture.size[0] > 700


def test_a_photo_that_is_not_there(capsys):
  options = ["--photo", "0", "--title", "", "--credit", "", "--out", "x.png"]
  assert photo_token_maps.main(["missing.safetensors", "missing", *options]) == 2
  assert "missing.safetensors" in capsys.readouterr().err
