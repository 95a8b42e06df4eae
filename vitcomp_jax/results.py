"""What the stages of a run report."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax

from vitcomp_jax.records import Record

_PACKAGES = ("vitcomp_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

Variant = Literal["finetune", "before_finetune", "masked", "plan"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Record):
  """One row of `result.json`: a model, what it costs, and what was measured of it.

  Attributes:
    method: What made the model's plan; `dense` for none.
    budget: Its share of the dense model's MACs, where the method has rows for several.
    plan: Name or path of a plan that a comparison was given; the row is named after it.
    variant: What else tells the row from another of its method: weights after `finetune` or
      `before_finetune`, cut units that are `masked` instead, or a `plan` that was given where a
      schedule of the same name is computed.
    seed: Of the search that made the plan; the first of them where the row is a mean.
    top1: In percent of all examples, as `top5`.
    loss: Mean cross-entropy in nats.
    logit_divergence: From the dense model's, where there are no labels, as `feature_divergence`.
    gmacs: 1e9 multiply-accumulates per image.
    params_m: 1e6 parameters.
    images_per_second: By batch size.
    top1_se: Standard error over the examples; so are all that end in `_se`.
    top1_of_seeds: Of each search whose mean the row is.
    reference: Name of the row from which, example by example, the row's differences are.
  """

  method: str
  budget: float | None = None
  plan: str | None = None
  variant: Variant | None = None
  seed: int | None = None
  top1: float | None = None
  top5: float | None = None
  loss: float | None = None
  logit_divergence: float | None = None
  feature_divergence: float | None = None
  gmacs: float | None = None
  params_m: float | None = None
  images_per_second: Mapping[str, float] | None = None
  top1_se: float | None = None
  loss_se: float | None = None
  top1_of_seeds: tuple[float, ...] | None = None
  reference: str | None = None
  top1_over_reference: float | None = None
  top1_over_reference_se: float | None = None
  loss_over_reference: float | None = None
  loss_over_reference_se: float | None = None

  @property
  def name(self) -> str:
    """Returns what tells the row from all others of its table."""
    if self.plan:
      return self.plan
    trained = "+finetune" if self.variant == "finetune" else ""
    budget = "" if self.budget is None else f"@{self.budget:g}"
    other = f"@{self.variant}" if self.variant and not trained else ""
    return f"{self.method}{trained}{budget}{other}"

  @property
  def series(self) -> str:
    """Returns the name that rows of one method at several budgets share."""
    if self.plan:
      return f"{self.method} (given plans)"
    return dataclasses.replace(self, budget=None).name

  @property
  def is_evaluated(self) -> bool:
    """Returns whether outputs were measured, and not the speed alone."""
    return self.loss is not None or self.feature_divergence is not None

  def with_metrics(self, metrics: Mapping[str, float | None]) -> "Row":
    """Returns the row with metrics, by the names of their fields."""
    changes: dict[str, Any] = dict(metrics)
    return dataclasses.replace(self, **changes)

  def to_json(self) -> dict[str, Any]:
    return {"name": self.name, **super().to_json()}

  @classmethod
  def from_json(cls, values: Any, where: str) -> Self:
    # Rows that were written before rows had a method are told apart by their name alone.
    if isinstance(values, dict) and "name" in values:
      values = {"method": values["name"], **values}
    return super().from_json(values, where)


@dataclasses.dataclass(frozen=True)
class RandomSchedules(Record):
  """Random schedules of one budget, summarised.

  Attributes:
    schedules: How many.
    examples: On which they were measured.
    top1: Quantiles in percent, by their share; so is `loss`, in nats.
    diffrate: The search's top-1 and loss on the same examples, where there was one.
    beaten_by_top1: Share of the schedules whose top-1 is below the search's.
    beaten_by_loss: Share of the schedules whose loss is above the search's.
  """

  schedules: int
  examples: int
  top1: Mapping[str, float]
  loss: Mapping[str, float]
  diffrate: Mapping[str, float] | None = None
  beaten_by_top1: float | None = None
  beaten_by_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Result(Record):
  """The content of `result.json`.

  Attributes:
    dataset: Name of the data set.
    split: Of it.
    examples: On which the rows were measured.
    device: On which.
    versions: Of packages, by name.
    rows: One for each model.
    random: Random schedules by budget; None but of a comparison.
  """

  dataset: str
  split: str
  examples: int
  device: str
  versions: Mapping[str, str]
  rows: tuple[Row, ...] = ()
  random: Mapping[str, RandomSchedules] | None = None

  @property
  def by_name(self) -> dict[str, Row]:
    """Returns the rows by their names."""
    return {row.name: row for row in self.rows}


@dataclasses.dataclass(frozen=True)
class TrainResult(Record):
  """What training took.

  Attributes:
    steps: Optimizer steps.
    images: Seen in all of them.
    minutes: Spent, earlier sittings included.
    timm: How timm loads the slimmed network, or why it does not.
  """

  steps: int
  images: int
  minutes: float
  timm: str | None = None


@dataclasses.dataclass(frozen=True)
class SearchResult(Record):
  """What a search for one budget took and found; `raw_` is before its adjustment to the budget.

  Attributes:
    plan: Name of the plan.
    steps: Optimizer steps.
    images: Seen in all of them, and to choose the plan.
    minutes: Spent, earlier sittings included.
    chosen_step: After which the plan was passed through that was kept.
    raw_counts: Tokens after pruning and after merging, by layer; so are `counts`.
    gmacs: 1e9 multiply-accumulates per image.
    budget_gmacs: What was asked for; None: a latency.
    latency_ms: By the latency table, of `batch` images on `device`.
    offset: On the expected counts, that made the plan meet the budget.
    tried: Step and loss of each plan that was tried.
    front: Of a search for several budgets, the results of all.
  """

  plan: str
  steps: int
  images: int
  minutes: float
  chosen_step: int
  raw_counts: tuple[tuple[int, int], ...]
  counts: tuple[tuple[int, int], ...]
  raw_gmacs: float
  gmacs: float
  budget_gmacs: float | None = None
  budget_latency_ms: float | None = None
  raw_latency_ms: float | None = None
  latency_ms: float | None = None
  device: str | None = None
  batch: int | None = None
  offset: float | None = None
  tried: tuple[tuple[int, float], ...] = ()
  front: tuple["SearchResult", ...] | None = None


@dataclasses.dataclass(frozen=True)
class SlimResult(Record):
  """What slimming took and cut.

  Attributes:
    steps: Optimizer steps; 0: an earlier search was cut anew.
    images: Seen in all of them.
    minutes: Spent, earlier sittings included.
    histogram_limits: Values of the masks between which they are counted.
    shares: Of the masks of each kind, asked for; `kept`, reached.
    gmacs: 1e9 multiply-accumulates per image, and `of_dense` its share.
    params_m: 1e6 parameters.
    authors_params_m: By the authors' own formula, as `authors_gmacs`.
    timm: How timm loads the slimmed network, or why it does not.
    budget_gmacs: What was asked for; None: shares.
  """

  steps: int
  images: int
  minutes: float
  histogram_limits: tuple[float, float]
  shares: Mapping[str, float]
  kept: Mapping[str, float]
  gmacs: float
  of_dense: float
  params_m: float
  authors_params_m: float
  authors_gmacs: float
  timm: str
  budget_gmacs: float | None = None


@dataclasses.dataclass(frozen=True)
class Timing(Record):
  """One model at one batch size in `benchmark.json`.

  Attributes:
    name: Of the row.
    batch: Images at once.
    images_per_second: By the median.
    spread: Distance of the quartiles, relative to the median.
    latency_ms: Of a batch, by percentile.
    timings: How many batches were timed.
    compile_s: What compiling took.
    first_step_s: What the first batch took.
    memory_mb: At its peak.
    gmacs: 1e9 multiply-accumulates per image.
    share_of_peak: Of the machine's matrix product.
    promised: How many times fewer MACs than the dense model has.
    speed_up: How many times faster than the dense model it is.
    share_of_promise: The one over the other.
    predicted_ms: What the latency table of a search foretold.
  """

  name: str
  batch: int
  images_per_second: float
  spread: float
  latency_ms: Mapping[str, float]
  timings: int
  compile_s: float
  first_step_s: float
  memory_mb: float
  gmacs: float
  share_of_peak: float
  promised: float | None = None
  speed_up: float | None = None
  share_of_promise: float | None = None
  predicted_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class BenchmarkResult(Record):
  """The content of `benchmark.json`.

  Attributes:
    device: On which.
    versions: Of packages, by name.
    matmul_peak_gflops: 1e9 floating-point operations per second of a large matrix product.
    entries: One for each model and batch size.
  """

  device: str
  versions: Mapping[str, str]
  matmul_peak_gflops: float
  entries: tuple[Timing, ...]


@dataclasses.dataclass(frozen=True)
class VisualizeResult(Record):
  """The names of the plots in `figures/`."""

  figures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ExportResult(Record):
  """What the export's manifest says of each artefact."""

  artefacts: tuple[Mapping[str, Any], ...]


def environment() -> dict[str, Any]:
  """Returns device and package versions, as they stand in config.json and result.json."""
  device = jax.devices()[0]
  return {
    "device": f"{len(jax.devices())} x {device.device_kind}",
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
  }
