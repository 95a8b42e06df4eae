"""Results of the stages of a run."""

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
  """One row of `result.json`: a model, its cost and its metrics.

  Attributes:
    method: Method that made the model's plan; `dense` without a plan.
    budget: Budget as a share of the dense model's MACs, if the method has rows at several.
    plan: Name or path of a given plan, which is also the row's name.
    variant: Distinguishes rows of one method: weights after `finetune` or `before_finetune`, cut
      units that are `masked` instead of removed, or a given `plan` with the name of a schedule.
    seed: Seed of the search that made the plan; the first seed if the row is a mean.
    top1: Top-1 accuracy over all examples, in percent; likewise `top5`.
    loss: Mean cross-entropy in nats.
    logit_divergence: Divergence from the dense model's logits, measured without labels; likewise
      `feature_divergence`.
    cosine: Cosine similarity to the dense model's features, or to its embedding if it has one.
    gmacs: 1e9 multiply-accumulates per image; those of the first seed if the row is a mean.
    params_m: 1e6 parameters, likewise.
    images_per_second: Throughput by batch size.
    minutes: Time of the search and the training, if any; the mean over the seeds.
    top1_se: Standard error of `top1` over the examples; likewise all fields that end in `_se`.
    top1_of_seeds: Top-1 accuracy of each seed, if the row is a mean.
    top1_over_dense: Paired difference of `top1` from the dense model's; likewise `loss_over_dense`.
    reference: Name of the row that the following differences are taken from.
    top1_over_reference: Paired difference of `top1`; likewise `loss_over_reference`.
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
  cosine: float | None = None
  gmacs: float | None = None
  params_m: float | None = None
  images_per_second: Mapping[str, float] | None = None
  minutes: float | None = None
  top1_se: float | None = None
  loss_se: float | None = None
  top1_of_seeds: tuple[float, ...] | None = None
  top1_over_dense: float | None = None
  top1_over_dense_se: float | None = None
  loss_over_dense: float | None = None
  loss_over_dense_se: float | None = None
  reference: str | None = None
  top1_over_reference: float | None = None
  top1_over_reference_se: float | None = None
  loss_over_reference: float | None = None
  loss_over_reference_se: float | None = None

  @property
  def name(self) -> str:
    """Returns the row's name, which is unique in its table."""
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
    """Returns whether the outputs were measured, and not only the speed."""
    return self.loss is not None or self.feature_divergence is not None

  def with_metrics(self, metrics: Mapping[str, float | None]) -> "Row":
    """Returns the row with the given metrics, by field name."""
    changes: dict[str, Any] = dict(metrics)
    return dataclasses.replace(self, **changes)

  def to_json(self) -> dict[str, Any]:
    return {"name": self.name, **super().to_json()}

  @classmethod
  def from_json(cls, values: Any, where: str) -> Self:
    # Rows in older files have a name but no method.
    if isinstance(values, dict) and "name" in values:
      values = {"method": values["name"], **values}
    return super().from_json(values, where)


@dataclasses.dataclass(frozen=True)
class RandomSchedules(Record):
  """A summary of the random schedules at one budget.

  Attributes:
    schedules: Number of schedules.
    examples: Number of examples.
    top1: Quantiles of top-1 in percent, by share of the schedules; likewise `loss` in nats.
    diffrate: Top-1 and loss of the search on the same examples, if there was a search.
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
    split: Split of the data set.
    examples: Number of examples.
    device: Device of the run.
    versions: Package versions by name.
    rows: One row per model.
    random: Random schedules by budget; None if there are none.
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
  """Steps and time of a training run.

  Attributes:
    steps: Optimizer steps.
    images: Images seen in all steps.
    minutes: Training time, including interrupted attempts.
    timm: How timm loads the slimmed network, or why it cannot.
  """

  steps: int
  images: int
  minutes: float
  timm: str | None = None


@dataclasses.dataclass(frozen=True)
class SearchResult(Record):
  """Steps, time and result of a search; `raw_` values precede the adjustment to the budget.

  Attributes:
    plan: Name of the plan.
    steps: Optimizer steps.
    images: Images used in all steps, to choose the plan, and to sort the widths.
    minutes: Search time, including interrupted attempts.
    chosen_step: Step of the chosen plan.
    raw_counts: Tokens after pruning and after merging, by layer; likewise `counts`.
    raw_gmacs: 1e9 multiply-accumulates per image; likewise `gmacs`.
    budget_gmacs: Requested budget; None if it is a latency.
    budget_latency_ms: Requested budget; None if it is in MACs.
    raw_latency_ms: Latency of `batch` images on `device`, from the latency table of `runtime`;
      likewise `latency_ms`.
    offset: Offset added to the expected counts to meet the budget, as a share of each list.
    tried: Step and loss of each tried plan.
    front: Results for all budgets, if there are several.
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
  runtime: str | None = None
  device: str | None = None
  batch: int | None = None
  offset: float | None = None
  tried: tuple[tuple[int, float], ...] = ()
  front: tuple["SearchResult", ...] | None = None


@dataclasses.dataclass(frozen=True)
class SlimResult(Record):
  """Steps, time and result of slimming.

  Attributes:
    steps: Optimizer steps; 0 if the masks of an earlier search were cut.
    images: Images seen in all steps.
    minutes: Search time, including interrupted attempts.
    histogram_limits: Range of the masks' histograms.
    shares: Requested share of each kind of mask.
    kept: Achieved share of each kind of mask.
    gmacs: 1e9 multiply-accumulates per image.
    of_dense: MACs as a share of the dense model's.
    params_m: 1e6 parameters.
    authors_params_m: 1e6 parameters by the authors' formula; likewise `authors_gmacs`.
    timm: How timm loads the slimmed network, or why it cannot.
    budget_gmacs: Requested budget; None if shares were requested.
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
    name: Name of the row.
    batch: Batch size.
    images_per_second: Throughput at the median time.
    spread: Interquartile range of the times relative to their median.
    latency_ms: Latency of a batch by percentile.
    timings: Number of timed batches.
    compile_s: Compilation time in seconds.
    first_step_s: Time of the first batch in seconds.
    gmacs: 1e9 multiply-accumulates per image.
    share_of_peak: Share of the device's matrix-product peak.
    promised: Ratio of the dense model's MACs to this model's.
    speed_up: Ratio of the dense model's time to this model's.
    share_of_promise: `speed_up` relative to `promised`.
    predicted_ms: Latency predicted by a search's latency table.
    memory_mb: Peak memory; None if the runtime does not report it.
    runtime: Runtime that ran the model.
  """

  name: str
  batch: int
  images_per_second: float
  spread: float
  latency_ms: Mapping[str, float]
  timings: int
  compile_s: float
  first_step_s: float
  gmacs: float
  share_of_peak: float
  promised: float | None = None
  speed_up: float | None = None
  share_of_promise: float | None = None
  predicted_ms: float | None = None
  memory_mb: float | None = None
  runtime: str = "jax"


@dataclasses.dataclass(frozen=True)
class BenchmarkResult(Record):
  """The content of `benchmark.json`.

  Attributes:
    device: Device of the run.
    versions: Package versions by name.
    matmul_peak_gflops: 1e9 floating-point operations per second in a large matrix product.
    entries: One entry per model and batch size.
  """

  device: str
  versions: Mapping[str, str]
  matmul_peak_gflops: float
  entries: tuple[Timing, ...]


@dataclasses.dataclass(frozen=True)
class VisualizeResult(Record):
  """Names of the plots in `figures/`."""

  figures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ExportResult(Record):
  """The export manifest's entries for the artefacts."""

  artefacts: tuple[Mapping[str, Any], ...]


def environment() -> dict[str, Any]:
  """Returns the device and package versions, as stored in config.json and result.json."""
  device = jax.devices()[0]
  return {
    "device": f"{len(jax.devices())} x {device.device_kind}",
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
  }
