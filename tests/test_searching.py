"""A search from Python: arrays, iterables, labels or none, and the stage's own plan."""

import itertools

import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import random_params
from vitcomp_jax import methods
from vitcomp_jax.data.arrays import endless_batches
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.models.build import build
from vitcomp_jax.models.variants import get_spec
from vitcomp_jax.searching import search

pytestmark = pytest.mark.usefixtures("optax_promotion")

SPEC = get_spec("vit_mini_patch3_30")
SIDE = SPEC.image_size[0]
IMAGES = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(20) % SPEC.num_classes


@pytest.fixture(scope="module")
def dense():
  return build(SPEC, SPEC.dense_layers), random_params(SPEC)


def _search(dense, data, **options):
  defaults = {"macs": 0.7, "steps": 3, "batch_size": 8, "choose_images": 8}
  return search(*dense, data, **defaults | options)


def test_a_search_meets_its_budget_and_keeps_its_history(dense):
  plan = _search(dense, (IMAGES, LABELS))
  small = build(SPEC, plan.layers_for(SPEC))
  share = vc.count_cost(small).gmacs / vc.count_cost(dense[0]).gmacs
  assert share == pytest.approx(0.7, abs=0.05)
  assert [each.step for each in plan.history] == [0, 1, 2, 3]
  assert plan in [each.plan for each in plan.history]
  assert min(each.loss for each in plan.history) == next(
    each.loss for each in plan.history if each.plan == plan
  )


def test_batches_may_come_in_any_form():
  halves = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:16], LABELS[8:16])]
  named = [{"image": x, "label": y} for x, y in halves]
  for data in (halves, named, tuple(halves)):
    stream, has_labels = endless_batches(data, 4, seed=0)
    assert has_labels
    for expected in (*halves, *halves):
      batch = next(stream)
      np.testing.assert_array_equal(batch["image"], expected[0])
      np.testing.assert_array_equal(batch["label"], expected[1])
  stream, has_labels = endless_batches([x for x, _ in halves], 4, seed=0)
  assert not has_labels and next(stream)["label"].tolist() == [0] * 8


def test_floats_are_taken_as_normalised():
  floats = normalize(IMAGES, SPEC.preprocess)
  np.testing.assert_array_equal(normalize(floats, SPEC.preprocess), floats)


@pytest.mark.parametrize(
  ("data", "said"),
  [
    ([IMAGES[:8], (IMAGES[:8], LABELS[:8])], "expected labels in every batch or in none"),
    ((x for x in [IMAGES[:8]]), "expected more batches than 1"),
  ],
)
def test_an_iterable_that_changes_or_ends_is_refused(data, said):
  stream, _ = endless_batches(data, 8, seed=0)
  with pytest.raises(vc.UserError, match=said):
    list(itertools.islice(stream, 3))


def test_an_epoch_holds_every_image_once():
  stream, has_labels = endless_batches((IMAGES, LABELS), 8, seed=0)
  rows = np.concatenate([next(stream)["image"][:, 0, 0, 0] for _ in range(5)])
  assert has_labels
  for epoch in (rows[:20], rows[20:]):
    np.testing.assert_array_equal(np.sort(epoch), np.sort(IMAGES[:, 0, 0, 0]))


@pytest.mark.parametrize(
  ("data", "options", "said"),
  [
    (IMAGES[:, :-1], {}, "expected images of"),
    (IMAGES[0], {}, r"expected images of shape \[n, height, width, 3\]"),
    ((IMAGES, LABELS[:3]), {}, "expected 20 labels"),
    ((IMAGES, LABELS + 100), {}, "expected labels from 0 to"),
    (IMAGES.astype(np.int32), {}, "expected images of uint8 or floats, got int32"),
    (IMAGES, {"loss": "labels"}, "expected logits or features for data without labels"),
    (3, {}, "expected arrays or an iterable of batches, got int"),
    ([], {}, "expected more batches than 0"),
    (IMAGES, {"macs": None}, "expected one of macs, gmacs and latency_ms, got none"),
    (IMAGES, {"gmacs": 1.0}, "expected one of macs, gmacs and latency_ms, got macs and gmacs"),
    (IMAGES, {"macs": 1.5}, "macs: expected more than 0 and at most 1"),
    (IMAGES, {"macs": 1e-4}, "smallest plan"),
    (IMAGES, {"stepz": 3}, "config.search.stepz does not exist"),
    (IMAGES, {"steps": 0}, "config.search.steps"),
  ],
)
def test_what_does_not_fit_is_refused(dense, data, options, said):
  with pytest.raises(vc.UserError, match=said):
    _search(dense, data, **options)


def test_a_compressed_model_is_refused(dense):
  small = build(SPEC, methods.tome.layers(SPEC, r=2))
  with pytest.raises(vc.UserError, match="expected a dense one to search on"):
    _search((small, dense[1]), IMAGES)
