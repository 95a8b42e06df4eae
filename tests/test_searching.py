"""A search from Python: arrays, iterables, labels or none, and the stage's own plan."""

import itertools
import json

import numpy as np
import pytest

import vitcomp_jax as vc
from tests.models import random_params
from tests.tiny_main import TINY, tiny_spec
from vitcomp_jax import methods
from vitcomp_jax.config import default_config, from_config_dict
from vitcomp_jax.data.arrays import endless_batches
from vitcomp_jax.data.transforms import normalize
from vitcomp_jax.models.build import build
from vitcomp_jax.models.variants import VARIANTS
from vitcomp_jax.runs.run import open_run
from vitcomp_jax.searching import search

pytestmark = pytest.mark.usefixtures("optax_promotion")

SPEC = tiny_spec()
SIDE = SPEC.image_size[0]
IMAGES = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(20) % SPEC.num_classes


@pytest.fixture(scope="module", autouse=True)
def dense():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(VARIANTS, TINY, SPEC)
    yield build(SPEC, SPEC.dense_layers), random_params(SPEC)


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


def test_only_images_that_are_used_are_counted(dense):
  """The authors choose no plan, so they need no images to choose by."""
  ours = _search(dense, IMAGES, steps=2, choose_images=9)
  theirs = _search(dense, (IMAGES, LABELS), steps=2, recipe="paper")
  assert (ours.made_by["images"], theirs.made_by["images"]) == (4 * 8, 2 * 8)


def test_batches_may_come_in_any_form():
  halves = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:16], LABELS[8:16])]
  named = [{"image": x, "label": y} for x, y in halves]
  for data in (halves, named, tuple(halves), [list(pair) for pair in halves]):
    stream, has_labels = endless_batches(data, 4, seed=0)
    assert has_labels
    for expected in (*halves, *halves):
      batch = next(stream)
      np.testing.assert_array_equal(batch["image"], expected[0])
      np.testing.assert_array_equal(batch["label"], expected[1])
  stream, has_labels = endless_batches([x for x, _ in halves], 4, seed=0)
  assert not has_labels and next(stream)["label"].tolist() == [0] * 8


@pytest.mark.slow
def test_a_search_is_that_of_a_run(tmp_path):
  """The same batches, in a run and as a list, give the same plan."""
  config = default_config()
  config.model.variant = TINY
  config.data.pad, config.budget.fraction, config.seed = 1, 0.7, 3
  search_config = config.search
  search_config.steps, search_config.batch_size, search_config.choose_images = 3, 8, 8
  plan = vc.run_stage("search", config, tmp_path)
  run = open_run(from_config_dict(config), tmp_path)
  batches = list(itertools.islice(run.inputs.train_batches(8, 0), 4))
  options = {"macs": 0.7, "steps": 3, "choose_images": 8, "seed": 3}
  model = build(run.inputs.spec, run.inputs.spec.dense_layers)
  # The library holds back the first batches to choose by, the run the last ones.
  again = search(model, run.artefacts.dense_params, [batches[3], *batches[:3]], **options)
  assert again.layers == plan.layers
  tried = json.loads((tmp_path / "finished/search.json").read_text())["tried"]
  assert [each.step for each in again.history] == [step for step, _ in tried]
  np.testing.assert_allclose([each.loss for each in again.history], [loss for _, loss in tried])


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
    ((IMAGES, LABELS / 2), {}, "expected whole numbers as labels, got float64"),
    ((IMAGES, np.eye(20)), {}, r"expected 20 labels, one for each image, .* \[20, 20\]"),
    ((IMAGES, np.array(3)), {}, "expected 20 labels, one for each image"),
    ([[IMAGES[0], IMAGES[0][:-1]]], {}, "expected batches of images of one size"),
    (IMAGES, {"what": "weights"}, "config.search.what: expected one of tokens, widths"),
    (IMAGES, {"log_every": 1}, "log_every: expected options of a search without a workdir"),
    (IMAGES, {"seed": -1}, "config.seed"),
    ([IMAGES[:7]], {}, "expected batches that the 2 devices divide, got one of 7"),
    (IMAGES.astype(np.int32), {}, "expected images of uint8 or floats, got int32"),
    (IMAGES, {"loss": "labels"}, "expected logits or features for data that have no labels"),
    (3, {}, "expected arrays or an iterable of batches, got int"),
    ([], {}, "expected more batches than 0"),
    (IMAGES, {"macs": None}, "expected one of macs, gmacs and latency_ms, got none"),
    (IMAGES, {"runtime": "onnxruntime"}, "runtime: expected jax without latency_ms, got"),
    (IMAGES, {"gmacs": 1.0}, "expected one of macs, gmacs and latency_ms, got macs and gmacs"),
    (
      IMAGES,
      {"macs": None, "latency_ms": 1.0, "runtime": "tflite"},
      "expected jax or onnxruntime, got 'tflite'",
    ),
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
