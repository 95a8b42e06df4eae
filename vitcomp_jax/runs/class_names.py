"""Resolves the class name of each output of a run's model."""

import dataclasses
import functools

from vitcomp_jax.config import DataConfig
from vitcomp_jax.data import labels, loader, sources
from vitcomp_jax.models.spec import ViTSpec


@dataclasses.dataclass(frozen=True)
class Splits:
  """The splits of the data, each opened only once, as a folder may hold a million files.

  Attributes:
    config: The data part of the config.
    trains: Whether the run trains, and so needs training images.
  """

  config: DataConfig
  trains: bool

  @functools.cached_property
  def train(self) -> sources.Source | None:
    """Returns the training images; None for the data set `fake`, which needs no files."""
    return self._opened("train")

  @functools.cached_property
  def eval(self) -> sources.Source | None:
    """Returns the evaluation images; None for the data set `fake`, which needs no files."""
    return self._opened("eval")

  @functools.cached_property
  def class_names(self) -> tuple[str, ...]:
    """Returns the data's own class names, in order; empty if there are no labels."""
    if self.trains and self.train and self.train.class_names:
      return tuple(self.train.class_names)
    return tuple(self.eval.class_names) if self.eval else ()

  def _opened(self, split: str) -> sources.Source | None:
    return None if self.config.name == "fake" else loader.open_source(self.config, split)


@dataclasses.dataclass(frozen=True)
class ClassNames:
  """Class names from a run's config, its data and its record.

  Attributes:
    splits: Splits of the data.
    recorded: Names recorded when the run began; empty if it has not begun.
    head_is_new: Whether the classifier of this run is trained from scratch, or random.
  """

  splits: Splits
  recorded: tuple[str, ...]
  head_is_new: bool

  @functools.cached_property
  def asked(self) -> tuple[str, ...]:
    """Returns the names in `config.data.classes`; empty if it is not set."""
    asked = self.splits.config.classes
    return labels.read_names(asked) if asked else ()

  @property
  def num_trained(self) -> int | None:
    """Returns the number of outputs of a new classifier; None if unknown."""
    return len(self.recorded or self.asked or self.splits.class_names) or None

  def of_outputs(self, spec: ViTSpec, of_labels: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of a model's outputs, in order; empty if unknown or without a classifier.

    Args:
      spec: The model.
      of_labels: Result of `of_labels`.
    """
    if not spec.has_classifier:
      return ()
    if self.asked:
      labels.check_count(self.asked, spec.num_classes)
      return self.asked
    if spec.class_names and (not self.head_is_new or labels.are_numbers(of_labels)):
      return spec.class_names
    return of_labels or spec.class_names

  def of_labels(self, spec: ViTSpec) -> tuple[str, ...]:
    """Returns the names of the outputs that the data's classes are matched with.

    Raises:
      UserError: If the classes cannot be matched unambiguously.
    """
    if not spec.has_classifier or not self.splits.class_names:
      return ()
    if self.asked:
      labels.check_count(self.asked, spec.num_classes)
      return self.asked
    data, names, known = self.splits.config, self.splits.class_names, spec.class_names
    if self.head_is_new and not (known and labels.are_numbers(names)):
      return labels.name_trained_outputs(names, spec.num_classes, known, data.name)
    # Only image folders have a configurable order.
    order = data.class_order if data.name == "folder" else "sorted"
    return labels.name_outputs(names, spec.num_classes, known, data.name, order)
