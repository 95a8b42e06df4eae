"""Heads that project to an embedding, as CLIP's, are not taken for classifiers."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

import vitcomp_jax as vc
from tests.models import random_images, random_params, small_spec
from vitcomp_jax.config import SearchConfig
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.build import build
from vitcomp_jax.ops import losses
from vitcomp_jax.training.search_loss import TaskLoss, best_loss
from vitcomp_jax.weights import loading
from vitcomp_jax.weights.files import open_source

SPEC = small_spec(norm_pre=True, num_classes=6)


@pytest.fixture
def checkpoint(tmp_path):
  """A file of timm's names whose head has no bias."""
  path = tmp_path / "clip.safetensors"
  loading.save_params(SPEC, random_params(SPEC), path)
  tensors = {name: np.asarray(value) for name, value in open_source(str(path)).tensors.items()}
  del tensors["head.bias"]
  safetensors.numpy.save_file(tensors, path)
  return str(path)


def fields():
  return {"num_heads": 2, "norm_eps": 1e-5, "activation": "quick_gelu", "pool": "cls"}


def test_a_head_without_bias_projects(checkpoint, tmp_path):
  model, params = vc.load(checkpoint, **fields())
  assert model.spec.projection and not model.spec.has_classifier
  vc.save(tmp_path / "saved", model, params)
  assert vc.load(tmp_path / "saved")[0].spec == model.spec


@pytest.mark.parametrize("num_classes", [0, 3])
def test_another_head_does_not(num_classes, checkpoint):
  spec = loading.spec_for(None, checkpoint, num_classes, given=fields())
  assert not spec.projection and spec.has_classifier == bool(num_classes)


def test_a_search_follows_the_embedding():
  spec = dataclasses.replace(SPEC, projection=True)
  config = dataclasses.replace(SearchConfig(), loss=best_loss(SearchConfig(), spec))
  assert config.loss == "features"
  loss = TaskLoss(spec, spec.dense_layers, config, spec.preprocess)
  images, params = random_images(spec, 3), random_params(spec)
  aim = loss.aim(params, images)
  out = build(spec, spec.dense_layers).apply(
    {"params": random_params(spec, 1)}, images, method="forward"
  )
  assert aim.shape == (3, 6)
  want = losses.feature_divergence(out.logits, aim)
  np.testing.assert_allclose(loss(out, jax.numpy.zeros((3, 6)), aim), want)


def test_labels_cannot_be_followed():
  spec = dataclasses.replace(SPEC, projection=True)
  images, labels = np.zeros((4, 24, 24, 3), np.uint8), np.zeros(4, np.int32)
  with pytest.raises(UserError, match="expected features for small"):
    model = build(spec, spec.dense_layers)
    vc.search(model, random_params(spec), (images, labels), macs=0.7, loss="labels")
