"""Tables of measurements: accuracy and cost, comparisons, and speed."""

from collections.abc import Mapping, Sequence

from vitcomp_jax.reporting.plots import number
from vitcomp_jax.reporting.render import Block, Table, Text
from vitcomp_jax.results import BenchmarkResult, RandomSchedules, Result, Row, Timing

MISSING = "–"
_ERRORS = "± is the standard error over the examples."
_METRICS = {
  "top1": "top-1 (%)",
  "top5": "top-5 (%)",
  "loss": "cross-entropy",
  "logit_divergence": "divergence of logits",
  "feature_divergence": "divergence of features",
  "cosine": "cosine to dense",
}


def formatted(value: float | None, spec: str) -> str:
  """Returns a formatted number; a dash for None."""
  return MISSING if value is None else format(value, spec)


def rows_table(rows: Sequence[Row]) -> Block:
  """Returns a table with one line per row, without empty columns."""
  if not rows:
    return Text("No model was measured: the stage `evaluate` has not run.")
  dense = _dense_gmacs(rows)
  timed: set[str] = set()
  for row in rows:
    timed.update(row.images_per_second or ())
  batches = sorted(timed, key=int)
  heads = ["model", *_METRICS.values(), "GMACs", "of dense", "params (M)"]
  heads += [f"images/s, batch {batch}" for batch in batches]
  cells = [_row_cells(row, dense, batches) for row in rows]
  caption = "Measured in this run; nothing in it is copied from elsewhere."
  if any(row.top1_se is not None for row in rows):
    caption += f" {_ERRORS}"
  return _without_empty_columns(caption, heads, cells)


def _without_empty_columns(
  caption: str, heads: Sequence[str], lines: Sequence[Sequence[str]]
) -> Table:
  columns = [c for c in zip(heads, *lines, strict=True) if set(c[1:]) != {MISSING}]
  shown, *cells = zip(*columns, strict=True)
  return Table(caption, shown, cells)


def _row_cells(row: Row, dense: float | None, batches: Sequence[str]) -> list[str]:
  cells = [row.name]
  for key in _METRICS:
    spec = ".2f" if key.startswith("top") else ".4f"
    cells.append(_with_error(getattr(row, key), getattr(row, f"{key}_se", None), spec))
  cells += [*_gmacs_cells(row.gmacs, dense), formatted(row.params_m, ".4g")]
  speeds = row.images_per_second or {}
  return cells + [formatted(speeds.get(batch), ".1f") for batch in batches]


def _dense_gmacs(rows: Sequence[Row]) -> float | None:
  return next((row.gmacs for row in rows if row.name == "dense"), None)


def _gmacs_cells(gmacs: float | None, dense: float | None) -> list[str]:
  """Returns a row's GMACs and their share of the dense model's."""
  if gmacs is None:
    return [MISSING, MISSING]
  return [number(gmacs), f"{100 * gmacs / dense:.1f} %" if dense else MISSING]


def comparison_blocks(result: Result) -> list[Block]:
  """Returns the table of a comparison and a sentence for each set of random schedules."""
  rows, dense = result.rows, _dense_gmacs(result.rows)
  heads = ["model", "top-1 (%)", "cross-entropy"]
  heads += ["top-1 over dense", "top-1 over reference", "cross-entropy over reference"]
  heads += ["GMACs", "of dense", "params (M)", "minutes"]
  lines = []
  for row in rows:
    errors = [_with_error(row.top1, row.top1_se, ".2f"), _with_error(row.loss, row.loss_se, ".4f")]
    errors.append(_with_error(row.top1_over_dense, row.top1_over_dense_se, "+.2f"))
    errors.append(_with_error(row.top1_over_reference, row.top1_over_reference_se, "+.2f"))
    errors.append(_with_error(row.loss_over_reference, row.loss_over_reference_se, "+.4f"))
    cost = [*_gmacs_cells(row.gmacs, dense), formatted(row.params_m, ".4g")]
    lines.append([row.name, *errors, *cost, formatted(row.minutes, ".1f")])
  blocks: list[Block] = [_without_empty_columns(_comparison_caption(rows), heads, lines)]
  for budget, schedules in (result.random or {}).items():
    blocks.append(Text(_random_text(budget, schedules)))
  return blocks


def _comparison_caption(rows: Sequence[Row]) -> str:
  captions = []
  if any(row.top1_se is not None for row in rows):
    captions.append(_ERRORS)
  if references := list(dict.fromkeys(row.reference for row in rows if row.reference)):
    captions.append(
      f"Differences are paired, example by example; the references are {', '.join(references)}."
    )
  if any(row.top1_of_seeds for row in rows):
    captions.append("A search with several seeds is shown as the mean over its seeds.")
  return " ".join(captions)


def _random_text(budget: str, found: RandomSchedules) -> str:
  line = (
    f"Random schedules at {budget} of the MACs: {found.schedules:,} on {found.examples:,} "
    f"examples, with 1st, 50th and 99th percentiles of top-1 of "
    f"{', '.join(f'{value:.2f}' for value in found.top1.values())} %"
  )
  if found.diffrate and found.beaten_by_top1 is not None and found.beaten_by_loss is not None:
    line += (
      f"; DiffRate, with {found.diffrate['top1']:.2f} %, beats "
      f"{100 * found.beaten_by_top1:.1f} % of them by top-1, and "
      f"{100 * found.beaten_by_loss:.1f} % by cross-entropy"
    )
  return f"{line}."


def _with_error(value: float | None, error: float | None, spec: str) -> str:
  # A single example has no standard error.
  if value is None or error is None:
    return formatted(value, spec)
  return f"{value:{spec}} ± {error:{spec.removeprefix('+')}}"


def speed_blocks(benchmark: BenchmarkResult) -> list[Block]:
  """Returns the table of a benchmark and its explanation."""
  is_predicted = any(entry.predicted_ms is not None for entry in benchmark.entries)
  heads = ["model", "batch", "images/s", "spread", "p50 (ms)", "p90 (ms)", "p99 (ms)"]
  heads += ["speed-up", "MACs promise", "of the peak", "memory (MB)", "compiling (s)"]
  heads += ["predicted (ms)"] if is_predicted else []
  lines = []
  for entry in benchmark.entries:
    predicted = [formatted(entry.predicted_ms, ".4g")] if is_predicted else []
    lines.append(_speed_cells(entry) + predicted)
  text = (
    "Medians; the spread is the interquartile range relative to the median. The peak is "
    f"that of a large float32 matrix product, {benchmark.matmul_peak_gflops:,.0f} GFLOP/s, "
    "measured in the same run. All models took turns."
  )
  if is_predicted:
    text += " Compare p50 with the prediction of the search's latency table."
  return [Table("Speed by model and batch size.", heads, lines), Text(text)]


def _speed_cells(entry: Timing) -> list[str]:
  return [
    entry.name if entry.runtime == "jax" else f"{entry.name}, {entry.runtime}",
    str(entry.batch),
    f"{entry.images_per_second:.1f}",
    _percent(entry.spread),
    *(f"{value:.4g}" for value in entry.latency_ms.values()),
    formatted(entry.speed_up, ".2f"),
    formatted(entry.promised, ".2f"),
    _percent(entry.share_of_peak),
    formatted(entry.memory_mb, ".0f"),
    f"{entry.compile_s:.1f}",
  ]


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def percents(shares: Mapping[str, float]) -> str:
  """Returns named shares in percent, separated by commas."""
  return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())
