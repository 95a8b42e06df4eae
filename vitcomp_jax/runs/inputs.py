"""Inputs of a run: the dense model's spec, the data, the devices and the budget."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator

from vitcomp_jax import paths
from vitcomp_jax.config import Config
from vitcomp_jax.cost import latency
from vitcomp_jax.cost.cost_models import MACS, CostModel
from vitcomp_jax.data import labels, loader, transforms
from vitcomp_jax.data.dataset import Batch, Dataset
from vitcomp_jax.data.halves import Unlabelled
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.diffrate.reducer import reduction
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.parallel import Layout
from vitcomp_jax.runs import budgets
from vitcomp_jax.runs.class_names import ClassNames
from vitcomp_jax.weights import description, loading

# Fields of the spec that weights may not specify.
_OPEN = ("num_heads", "norm_eps", "activation", "pool", "projection")


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs of a run, which no stage changes; each is created on first use.

  Attributes:
    config: Config of the run.
    workdir: Folder of the run, which may hold a latency table.
    names: Class names.
  """

  config: Config
  workdir: pathlib.Path
  names: ClassNames

  @functools.cached_property
  def spec(self) -> ViTSpec:
    """Returns the spec of the dense model, from its weights and the config.

    A head that is trained or random gets one output per class of the data, unless the config sets
    the number of classes.
    """
    model = self.config.model
    dtype = None if model.dtype == "float32" else model.dtype
    if model.attention == "cudnn" and dtype is None:
      raise UserError(
        "config.model.attention: cudnn computes in half precision only; set "
        "config.model.dtype=bfloat16."
      )
    classes = model.num_classes
    given = {name: getattr(model, name) for name in _OPEN if getattr(model, name) is not None}
    if classes is None and self.names.head_is_new and self._has_classifier:
      classes = self.names.num_trained
    spec = loading.spec_for(model.variant, model.weights, classes, model.image_size, dtype, given)
    spec = dataclasses.replace(spec, attention=model.attention)
    if model.antialias is not None:
      spec = dataclasses.replace(spec, antialias=model.antialias)
    # The config overrides the preprocessing of the weights.
    asked = {key: getattr(self.config.data, key) for key in description.PREPROCESS}
    asked = {key: value for key, value in asked.items() if value is not None}
    dataclasses.replace(spec.preprocess, **asked)  # raises for invalid values
    return dataclasses.replace(spec, **asked)

  @property
  def _has_classifier(self) -> bool:
    """Returns whether the variant, or else the weights' model, has a classifier."""
    model = self.config.model
    return loading.spec_for(model.variant, None if model.variant else model.weights).num_classes > 0

  @property
  def named_spec(self) -> ViTSpec:
    """Returns the spec with this run's class names."""
    return dataclasses.replace(self.spec, class_names=self.class_names)

  @functools.cached_property
  def class_names(self) -> tuple[str, ...]:
    """Returns the model's output names, in order; empty if unknown or without a classifier."""
    return self.names.of_outputs(self.spec, self._label_names or ())

  @functools.cached_property
  def _label_names(self) -> tuple[str, ...] | None:
    """Returns the output names that the data's classes match; None if labels are not used."""
    spec, names = self.spec, self.names
    if self.config.data.labels == "required":
      return names.of_labels(spec)
    of_eval = names.splits.eval.class_names if names.splits.eval else ()
    try:
      found = names.of_labels(spec)
      labels.match(of_eval if found else (), found, self.config.data.name)
    except UserError as why:
      logging.warning("labels are left out: %s", why)
      return None
    return found

  @property
  def leaves_labels_out(self) -> bool:
    """Returns whether the data's labels are ignored because they do not fit the model."""
    return self._label_names is None

  @property
  def preprocess(self) -> transforms.Preprocess:
    """Returns the preprocessing of every image."""
    return self.spec.preprocess

  @functools.cached_property
  def cost(self) -> CostModel:
    """Returns the cost that the budget limits; a latency table is measured on first use."""
    budget = self.config.budget
    if budget.latency_ms is None:
      return MACS
    budgets.given(budget)  # raises errors before minutes of measuring
    kept = self.workdir / "latency.json"
    if kept.exists():
      return latency.read(kept, budget.runtime)
    compiled = self.config.compilation_cache
    cache = pathlib.Path(paths.expand(compiled)).parent / "latency" if compiled else None
    reduce = reduction(self.spec, self.config.search.importance)
    return latency.table(self.spec, budget.latency_batch, reduce, cache, budget.runtime)

  @functools.cached_property
  def targets(self) -> dict[str, float]:
    """Returns the budgets in the unit of the cost, see `budgets.targets`."""
    return budgets.targets(self.config.budget, self.cost, self.spec)

  @property
  def target_gmacs(self) -> float:
    """Returns the budget for a stage that accepts only one, in 1e9 multiply-accumulates."""
    budgets.check_single_gmacs(self.config.budget)
    return self.targets[""]

  def gmacs_of(self, share: float) -> float:
    """Returns a share of the dense model's cost, in 1e9 multiply-accumulates."""
    return share * MACS.static(self.spec, self.spec.dense_layers)

  @functools.cached_property
  def layout(self) -> Layout:
    """Returns the layout of state and batches on the devices."""
    return Layout(self.config.parallel)

  @functools.cached_property
  def train_data(self) -> Dataset:
    """Returns the training images.

    Raises:
      UserError: If they cannot be read, or have classes that the model does not know.
    """
    return self._opened("train")

  @functools.cached_property
  def eval_data(self) -> Dataset:
    """Returns the evaluation images.

    Raises:
      UserError: If they cannot be read, or have classes that the model does not know.
    """
    return self._opened("eval")

  def _opened(self, split: str) -> Dataset:
    source = getattr(self.names.splits, split)
    if source and self._label_names is None:
      source = Unlabelled(source)
    seed, classes = self.config.seed, self.spec.num_classes or 1000
    return loader.load(
      self.config.data, split, self.preprocess, seed, classes, source, self._label_names or ()
    )

  def train_batches(self, batch_size: int, start_step: int) -> Iterator[Batch]:
    """Returns this process's rows of the training batches from a step on."""
    return self.train_data.train_batches(batch_size, start_step, self.layout.rows(batch_size))

  def eval_batches(self) -> Iterator[Batch]:
    """Returns this process's rows of batches that contain every example once.

    The batch size is `config.evaluate.batch_size`, rounded up to a multiple of the device count.
    """
    count = self.layout.num_devices
    size = -(-self.config.evaluate.batch_size // count) * count
    return self.eval_data.eval_batches(size, self.layout.rows(size))

  @property
  def has_scores(self) -> bool:
    """Returns whether the evaluation images have labels and the model has a classifier."""
    return self.eval_data.has_labels and self.spec.has_classifier

  def check_data(self, split: str) -> None:
    """Rejects a split, `train` or `eval`, that is missing or has classes that the model lacks."""
    _ = self.train_data if split == "train" else self.eval_data

  def check_budget(self) -> None:
    """Rejects a budget that only the stage `search` can meet, or that is out of range."""
    _ = self.target_gmacs

  def check_trainable(self, stage: str) -> None:
    """Rejects data without labels, or a model without a classifier."""
    if not self.train_data.has_labels or not self.spec.has_classifier:
      raise UserError(
        f"stage {stage}: expected labels and a classifier, got {self.spec.name} with "
        f"{self.spec.num_classes} classes on {self.train_data.name}."
      )

  def check_batches(self, stage: str) -> None:
    """Rejects a stage's batch size that the devices and parts cannot divide evenly."""
    config = getattr(self.config, stage)
    pairs = 2 if self.config.data.mixup or self.config.data.cutmix else 1
    self.layout.check_batch_size(f"{stage}.batch_size", config.batch_size, config.parts, pairs)
