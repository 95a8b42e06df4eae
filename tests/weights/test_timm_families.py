"""Tiny models of timm, one for each structure in its table, loaded by path alone."""

import pathlib
import shutil

import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import forward
from tools import timm_table

STORED = pathlib.Path(__file__).parent / "peers" / "timm_families"
MODELS = timm_table.bundled()[0]["models"]
STRUCTURES = timm_table.structures(MODELS)
# The eighth decimal is lost in sums of single precision.
TOLERANCE = 2e-6


def check_equals(folder, expected):
  """Compares a model that is loaded from a folder with what timm makes of images."""
  model, params = vc.load(str(folder))
  spec = model.spec
  output = forward(spec, spec.dense_layers, {"params": params}, expected["images"])
  assert difference(output.tokens.x, expected["tokens"]) < TOLERANCE
  assert difference(output.logits, expected["logits"]) < TOLERANCE


def difference(got, want):
  assert got.shape == want.shape
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def test_each_structure_is_stored():
  stored = sorted(path.name for path in STORED.iterdir())
  assert stored == sorted(names[0] for names in STRUCTURES)


# Some differ from others in one part only.
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(names[0], marks=[] if i % 3 == 0 else pytest.mark.slow)
    for i, names in enumerate(STRUCTURES)
  ],
)
def test_equals_timm(name):
  check_equals(STORED / name, np.load(STORED / name / "expected.npz"))


@pytest.mark.parametrize(
  ("name", "pool", "is_on_prefix"),
  [
    ("vit_so150m_patch16_reg4_gap_256", "size_mean", True),  # 12 patches and 4 registers
    ("vit_base_patch16_radio_v3", "cls", False),  # 12 patches behind 8 tokens
  ],
)
def test_squares_by_chance_do_not_mislead(name, pool, is_on_prefix, tmp_path):
  shutil.copy(STORED / name / "model.safetensors", tmp_path / "bare.safetensors")
  told = dict(num_heads=2, norm_eps=1e-6, activation="gelu", pool=pool, image_size=(16, 12))
  model, params = vc.load(str(tmp_path / "bare.safetensors"), **told)
  assert model.spec.pos_on_prefix == is_on_prefix
  expected = np.load(STORED / name / "expected.npz")
  output = forward(model.spec, model.layers, {"params": params}, expected["images"])
  assert difference(output.tokens.x, expected["tokens"]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [names[-1] for names in STRUCTURES])
def test_equals_the_timm_that_is_installed(name, tmp_path):
  pytest.importorskip("timm", reason="not run: timm is not installed, see the extra `peers`")
  from tools import timm_fixtures

  patch = MODELS[name]["patch_size"]
  sizes = {"img_size": (3 * patch, 4 * patch), "patch_size": patch, "embed_dim": 48, "depth": 2}
  sizes |= {"num_heads": 3, "mlp_ratio": 4.0, "num_classes": MODELS[name].get("num_classes", 1000)}
  model = timm_fixtures.small(name, sizes, seed=1)
  timm_fixtures.save(model, tmp_path)
  check_equals(tmp_path, timm_fixtures.expected(model, timm_fixtures.images_for(model, 2)))


def test_biases_by_relative_position_are_for_one_grid():
  with pytest.raises(
    vc.UserError, match="biases by relative position are not resampled, got 16 x 16"
  ):
    vc.load(str(STORED / "beit_base_patch16_224"), image_size=64)
