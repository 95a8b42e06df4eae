"""Searches for a plan on arrays, or on any iterable of batches, without a run."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from vitcomp_jax.config import SearchConfig, from_config_dict
from vitcomp_jax.cost import budgets, latency
from vitcomp_jax.cost.cost_models import MACS, CostModel
from vitcomp_jax.data.arrays import Batch, endless_batches
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate.reducer import reduction
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.parallel import Layout
from vitcomp_jax.plans import PassedPlan, Plan, make_plan
from vitcomp_jax.training import loop
from vitcomp_jax.training.search import SearchTrainer
from vitcomp_jax.training.search_loss import best_loss, check_loss
from vitcomp_jax.weights.loading import Params, check_params


def search(
  model: Backbone,
  params: Params,
  data: object,
  macs: float | None = None,
  *,
  gmacs: float | None = None,
  latency_ms: float | None = None,
  runtime: str = "jax",
  what: str = "tokens",
  loss: str | None = None,
  steps: int = 60,
  batch_size: int = 32,
  seed: int = 0,
  **options: object,
) -> Plan:
  """Learns how many tokens, and which widths, each layer of a model keeps under a budget.

  Args:
    model: Dense model, from `vc.load`.
    params: Weights of the model, which are not changed.
    data: Images [n h w 3]; a tuple of images and labels [n]; or an iterable of batches of either.
      Images are uint8 of the model's size, or floats from `vc.preprocess`.
    macs: The budget as a fraction of the dense model's multiply-accumulates, in (0, 1].
    gmacs: The budget in 1e9 multiply-accumulates per image.
    latency_ms: The budget as the latency of one image on this device, in milliseconds.
    runtime: Runtime to measure `latency_ms` with: `jax`, or `onnxruntime`, which runs the file that
      `vc.export` writes for it (needs `vitcomp_jax[onnx]`).
    what: What layers may lose: `tokens`, by pruning and merging; `widths`, which are hidden units
      and head dimensions; or `both`.
    loss: `labels` (cross-entropy), `logits` or `features` (divergence from the dense model's);
      None: `logits`, or `features` if there is no classifier.
    steps: Optimizer steps.
    batch_size: Images per step if the data are arrays.
    seed: Random seed.
    **options: Other keys of `config.search`, such as `tile` or `learning_rate`.

  Returns:
    The plan, adjusted to the budget, with its own weights if widths were searched. Its `history`
    holds the plans that the search passed through.

  Raises:
    UserError: If the data, the budget or an option is invalid, or a loss is not finite.

  References:
    Chen et al., `DiffRate <https://arxiv.org/abs/2305.17997>`_, 2023.

  Example:
    >>> import numpy as np
    >>> import vitcomp_jax as vc
    >>> model, params = vc.load("vit_mini_patch3_30", weights="bundled")
    >>> images = np.zeros((16, 30, 30, 3), np.uint8)
    >>> plan = vc.search(model, params, images, macs=0.7, steps=2, batch_size=8, choose_images=8)
    >>> small, small_params = vc.compress(model, params, plan)
    >>> round(vc.count_cost(small).gmacs / vc.count_cost(model).gmacs, 1)
    0.7
  """
  spec, layout = model.spec, Layout()
  _check_model(model)
  check_params(model, params)
  asked = {"macs": macs, "gmacs": gmacs, "latency_ms": latency_ms}
  budgets.check(asked)
  if latency_ms is not None:
    latency.check(spec, runtime, "latency_ms")
  elif runtime != "jax":
    raise UserError(f"runtime: expected jax without latency_ms, got {runtime!r}.")
  config = _config(loss, steps, batch_size, seed, {"what": what, **options})
  batches, has_labels = endless_batches(data, batch_size, seed)
  first = next(batches)
  batches = _checked(itertools.chain([first], batches), spec, has_labels, layout)
  config = dataclasses.replace(config, loss=best_loss(config, spec))
  check_loss(config.loss, spec, has_labels, "loss")
  cost = MACS if latency_ms is None else _latency(spec, config, runtime)
  target = budgets.target(spec, cost, asked)
  method = DiffRate(spec, target, config, cost=cost)
  method.check()
  trainer = SearchTrainer(method, config, spec.preprocess, layout, seed)
  size = len(first["image"])
  # Drawn first, so that an iterable that ends early fails before the search rather than after it.
  choosing = math.ceil(config.choose_images / size) if trainer.chooses else 0
  held_back = list(itertools.islice(batches, choosing))
  calibrating = 0 if config.what == "tokens" else math.ceil(config.calibration_images / size)
  factors = trainer.factors(params, list(itertools.islice(batches, calibrating)))
  trainer, arch = trainer.start(params, factors, held_back)
  epoch_steps = config.epoch_steps or config.steps
  task = trainer.task("search", params, lambda _: batches, epoch_steps, arch, factors)
  found = trainer.choose(loop.run(task, layout), params, factors, held_back)
  made_by = {
    "method": config.method,
    "loss": config.loss,
    "steps": config.steps,
    "images": (config.steps + choosing + calibrating) * size,
    "seed": seed,
  }
  passed = [PassedPlan(p.step, p.loss, make_plan(spec, p.layers, made_by)) for p in found.passed]
  plan = make_plan(spec, found.layers, made_by, params=found.params)
  return dataclasses.replace(plan, history=tuple(passed))


def _check_model(model: Backbone) -> None:
  """Rejects a compressed model, and a run of several processes."""
  if model.layers != model.spec.dense_layers:
    raise UserError("model: expected a dense one to search on, got one that is compressed already.")
  if jax.process_count() > 1:
    raise UserError(
      f"search: expected one process, got {jax.process_count()}; run the stage search in several."
    )


def _config(
  loss: str | None, steps: int, batch_size: int, seed: int, options: Mapping[str, object]
) -> SearchConfig:
  """Returns the checked options.

  Raises:
    UserError: If an option does not exist, is out of range, or only applies to a run.
  """
  for name in ("log_every", "checkpoint_every"):
    if name in options:
      raise UserError(f"{name}: expected options of a search without a workdir, got {name}.")
  values = {"loss": loss or "auto", "steps": steps, "batch_size": batch_size, **options}
  return from_config_dict({"seed": seed, "search": values}).search


def _latency(spec: ViTSpec, config: SearchConfig, runtime: str) -> CostModel:
  return latency.table(spec, 1, reduction(spec, config.importance), None, runtime)


def _checked(
  batches: Iterator[Batch], spec: ViTSpec, has_labels: bool, layout: Layout
) -> Iterator[Batch]:
  """Yields batches for the training step; rejects images and labels that do not fit the model."""
  for batch in batches:
    images, labels = batch["image"], batch["label"]
    height, width = spec.image_size
    if images.shape[1:] != (height, width, 3):
      raise UserError(
        f"data: expected images of {height} x {width} pixels for {spec.name}, got "
        f"{images.shape[1]} x {images.shape[2]}; vc.preprocess makes them so."
      )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
      raise UserError(f"data: expected images of uint8 or floats, got {images.dtype}.")
    is_in_range = 0 <= labels.min() <= labels.max() < spec.num_classes
    if has_labels and spec.has_classifier and not is_in_range:
      raise UserError(
        f"data: expected labels from 0 to {spec.num_classes - 1}, got {labels.min()} to "
        f"{labels.max()}."
      )
    if len(images) % layout.num_devices:
      raise UserError(
        f"data: expected batches that the {layout.num_devices} devices divide, got one of "
        f"{len(images)} images."
      )
    yield batch if images.dtype == np.uint8 else {**batch, "image": images.astype(np.float32)}
