"""Models that the installed transformers makes now, and that it reads from what is written here."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.models import forward, random_params
from tests.weights.test_huggingface import difference, read
from vitcomp_jax.models.variants import fields_of, spec_of
from vitcomp_jax.weights.dialects import huggingface
from vitcomp_jax.weights.dialects.huggingface_writing import to_huggingface
from vitcomp_jax.weights.files import open_source
from vitcomp_jax.weights.timm_names import to_timm

REASON = "the extra peers is not installed: its transformers was not compared"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

ROOT = pathlib.Path(__file__).parents[2]
PLACE = importlib.util.spec_from_file_location("peer", ROOT / "tools" / "huggingface_fixtures.py")
peer = importlib.util.module_from_spec(PLACE)
PLACE.loader.exec_module(peer)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
SIZES = {
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "intermediate_size": 40,
}


@pytest.mark.parametrize("name", peer.MODELS)
def test_equal_to_transformers(name, tmp_path):
  peer.write(tmp_path, name, SIZES)
  spec, params = read(open_source(str(tmp_path / name)))
  expected = np.load(tmp_path / name / "expected.npz")
  output = forward(spec, spec.dense_layers, {"params": params}, expected["images"])
  assert difference(output.tokens.x, expected["tokens"]) < 2e-6
  assert difference(output.logits, expected["logits"]) < 2e-6


@pytest.mark.parametrize("name", peer.MODELS)
def test_transformers_reads_what_is_written(name, tmp_path):
  """Of a model with other weights, depth, hidden units, image size and classes."""
  source = open_source(str(peer.FOLDER / name))
  described = huggingface.describe(source.configs, source.tensors)
  spec = spec_of({"name": name, **described.fields})
  changes = {"depth": 1, "mlp_dim": 16, "image_size": (24, 24)}
  if spec.pool == "map":
    changes["pool_mlp_dim"] = 16
  if spec.num_classes:
    changes["num_classes"] = 5
  spec = dataclasses.replace(spec, **changes)
  params = jax.tree.map(np.asarray, random_params(spec))
  if spec.num_classes and spec.fc_norm and name.startswith("clip"):
    params["head"]["bias"] = np.zeros(5, np.float32)  # a projection
  state = to_timm(params)
  tensors, config = to_huggingface(
    state, source.configs["config.json"], fields_of(spec, with_defaults=True)
  )
  arrays = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
  safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps(config))

  kind = getattr(transformers, config["architectures"][0])
  model, report = kind.from_pretrained(tmp_path, output_loading_info=True)
  assert set(report["missing_keys"]) <= {"pooler.dense.weight", "pooler.dense.bias"}
  assert not report["unexpected_keys"] and not report["mismatched_keys"]
  if hasattr(model.config, "mask_ratio"):
    model.config.mask_ratio = 0.0
  images = np.random.default_rng(0).normal(size=(2, 24, 24, spec.in_chans)).astype(np.float32)
  output = forward(spec, spec.dense_layers, {"params": params}, images)
  with torch.no_grad():
    expected = peer.expected(model.eval(), torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  assert difference(output.tokens.x, expected["tokens"].numpy()) < 2e-6
  assert difference(output.logits, expected["logits"].numpy()) < 2e-6
