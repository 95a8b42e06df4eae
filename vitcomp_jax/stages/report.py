"""The report of a run: `report.md`, what a person reads first. It shows measured figures only."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.atomic import write_text
from vitcomp_jax.stages.figures import number, tokens_left

CAPTIONS = {
  "schedule.png": "Tokens that each layer leaves, after pruning and after merging.",
  "accuracy.png": "Top-1 accuracy against compute, one point per row of the table.",
  "widths.png": "What each slimmed layer keeps, in percent of the dense one's.",
  "patches.png": "The patches that each layer keeps (dark), and how many.",
  "masks.png": (
    "The values of the soft masks over the steps of the slimming search: how many percent of them "
    "lie where."
  ),
  "search.png": "Loss and compute over the steps of the search; the dashed line is the budget.",
  "token_maps.png": (
    "What became of the patches of a few images: patches that share a token are painted in their "
    "mean colour and outlined, pruned ones are dark."
  ),
}
"""What the files in `figures/` show, in the order of the report."""

_MISSING = "–"
_FIGURES = {
  "top1": "top-1 (%)",
  "top5": "top-5 (%)",
  "loss": "cross-entropy",
  "logit_divergence": "divergence of logits",
  "feature_divergence": "divergence of features",
}


def write_report(
  workdir: pathlib.Path,
  result: Mapping[str, Any],
  plan_json: Mapping[str, Any] | None,
  counts: Sequence[tuple[int, int]],
  search_summary: Mapping[str, Any] | None,
  budget_text: str,
  slim_summary: Mapping[str, Any] | None = None,
) -> None:
  """Writes `report.md`.

  Args:
    workdir: Where the report goes and `figures/` may be.
    result: The content of result.json.
    plan_json: The content of plan.json, if there is a plan.
    counts: Tokens after pruning and after merging in each layer of the plan.
    search_summary: What the search reported, if there was one in this run.
    budget_text: The budget that was asked for; empty: none.
    slim_summary: What the slimming reported, if there was one in this run.
  """
  parts = [_title(result), _rows_table(result["rows"])]
  if search_summary is None and budget_text:
    parts.append(f"Budget: {budget_text}.")
  if slim_summary is not None:
    parts += ["## Slimming", _slim_text(slim_summary)]
  if search_summary is not None:
    parts += ["## Search", _search_text(search_summary, budget_text)]
  if plan_json is not None or search_summary is not None:
    parts += ["## Plan", *_plan_text(plan_json, counts, search_summary)]
  benchmark = workdir / "benchmark.json"
  if benchmark.exists():
    parts += ["## Speed", *_speed_text(json.loads(benchmark.read_text()))]
  figures = _figures(workdir)
  if figures:
    parts += ["## Figures", *figures]
  parts += ["## Versions", _versions(result.get("versions", {}))]
  write_text(workdir / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def _speed_text(benchmark: Mapping[str, Any]) -> list[str]:
  heads = ["model", "batch", "images/s", "spread", "p50 (ms)", "p90 (ms)", "p99 (ms)"]
  heads += ["speed-up", "MACs promise", "of the peak", "memory (MB)", "compiling (s)"]
  predicted = any("predicted_ms" in entry for entry in benchmark["entries"])
  heads += ["predicted (ms)"] if predicted else []
  lines = []
  for entry in benchmark["entries"]:
    latency = [f"{value:.4g}" for value in entry["latency_ms"].values()]
    gains = [_format(entry.get(key), ".2f") for key in ("speed_up", "promised")]
    spread, share = (f"{100 * entry[key]:.1f} %" for key in ("spread", "share_of_peak"))
    rate, memory = f"{entry['images_per_second']:.1f}", f"{entry['memory_mb']:.0f}"
    line = [entry["name"], str(entry["batch"]), rate, spread, *latency, *gains, share]
    line += [memory, f"{entry['compile_s']:.1f}"]
    lines.append([*line, _format(entry.get("predicted_ms"), ".4g")] if predicted else line)
  text = (
    "Medians; the spread is the distance of the quartiles, relative to the median. The peak is "
    f"that of a large float32 matrix product, {benchmark['matmul_peak_gflops']:,.0f} GFLOP/s, "
    "measured in the same run. All models took turns."
  )
  if predicted:
    text += " What the search's latency table predicted is to be held against p50."
  return [_table(heads, lines), text]


def write_comparison(workdir: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes the `report.md` of a comparison, from the content of its result.json."""
  rows = result["rows"]
  dense = rows[0]["gmacs"]
  heads = [
    "model",
    "top-1 (%)",
    "cross-entropy",
    "top-1 over diffrate",
    "cross-entropy over diffrate",
  ]
  heads += ["GMACs", "of dense", "params (M)"]
  lines = []
  for row in rows:
    figures = [_with_error(row, "top1", ".2f"), _with_error(row, "loss", ".4f")]
    figures += [
      _with_error(row, "top1_over_diffrate", "+.2f"),
      _with_error(row, "loss_over_diffrate", "+.4f"),
    ]
    share = f"{100 * row['gmacs'] / dense:.1f} %"
    lines.append([row["name"], *figures, number(row["gmacs"]), share, f"{row['params_m']:.4g}"])
  parts = [_title(result), _table(heads, lines)]
  parts.append(
    "± is the standard error over the examples; differences from DiffRate are paired, example by "
    "example. DiffRate's figures are means over its seeds."
  )
  for budget, found in result["random"].items():
    line = (
      f"Random schedules at {budget} of the MACs: {found['schedules']:,} on {found['examples']:,} "
      f"examples, top-1 of 1, 50 and 99 % of them up to "
      f"{', '.join(f'{value:.2f}' for value in found['top1'].values())} %"
    )
    if "beaten_by_top1" in found:
      line += (
        f"; DiffRate, with {found['diffrate']['top1']:.2f} %, is above "
        f"{100 * found['beaten_by_top1']:.1f} % of them, and by cross-entropy better than "
        f"{100 * found['beaten_by_loss']:.1f} %"
      )
    parts.append(f"{line}.")
  parts += ["## Figures", *_figures(workdir), "## Versions", _versions(result["versions"])]
  write_text(workdir / "report.md", "\n\n".join(parts) + "\n")


def _with_error(row: Mapping[str, Any], key: str, spec: str) -> str:
  if key not in row:
    return _MISSING
  return f"{row[key]:{spec}} ± {row[f'{key}_se']:{spec.removeprefix('+')}}"


def _title(result: Mapping[str, Any]) -> str:
  return (
    f"# Results on {result['dataset']}\n\n"
    f"Split `{result['split']}`, {result['examples']:,} examples, on {result['device']}."
  )


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line per row; a column that no row has is left out."""
  dense = next((row.get("gmacs") for row in rows if row["name"] == "dense"), None)
  heads = ["model", *_FIGURES.values(), "GMACs", "of dense", "params (M)"]
  batches = sorted({b for row in rows for b in row.get("images_per_second") or {}}, key=int)
  heads += [f"images/s, batch {batch}" for batch in batches]
  cells = [_row_cells(row, dense, batches) for row in rows]
  shown = [i for i in range(len(heads)) if any(line[i] != _MISSING for line in cells)]
  return _table([heads[i] for i in shown], [[line[i] for i in shown] for line in cells])


def _row_cells(row: Mapping[str, Any], dense: float | None, batches: Sequence[str]) -> list[str]:
  gmacs = row.get("gmacs")
  cells = [
    row["name"],
    *(_format(row.get(key), ".2f" if key.startswith("top") else ".4f") for key in _FIGURES),
    _MISSING if gmacs is None else number(gmacs),
    _MISSING if gmacs is None or not dense else f"{100 * gmacs / dense:.1f} %",
    _format(row.get("params_m"), ".4g"),
  ]
  speeds = row.get("images_per_second") or {}
  return cells + [_format(speeds.get(batch), ".1f") for batch in batches]


def _search_text(summary: Mapping[str, Any], budget_text: str) -> str:
  if "front" in summary:
    return _front_text(summary["front"])
  key, unit = ("latency_ms", "ms") if "latency_ms" in summary else ("gmacs", "GMACs")
  asked = f"{number(summary[f'budget_{key}'])} {unit}"
  if key == "latency_ms":
    asked += f" for a batch of {summary['batch']} on {summary['device']}, by `latency.json`"
  has_offset = summary.get("offset") is not None
  by = f", by an offset of {summary['offset']:+.3g} on the expected counts" if has_offset else ""
  lines = [
    f"{summary['steps']:,} steps on {summary['images']:,} images, {summary['minutes']:.1f} minutes",
    f"Budget: {budget_text} ({asked})" if budget_text else f"Budget: {asked}",
    *_chosen_text(summary),
    f"Plan as learnt: {number(summary[f'raw_{key}'])} {unit}",
    f"Plan adjusted to the budget: {number(summary[key])} {unit}{by}",
  ]
  return "\n".join(f"- {line}" for line in lines)


def _front_text(front: Sequence[Mapping[str, Any]]) -> str:
  """A search for several budgets, one line for each."""
  heads = ["plan", "budget (GMACs)", "as learnt", "adjusted", "kept step", "its loss"]
  lines = []
  for summary in front:
    cells = [number(summary[key]) for key in ("budget_gmacs", "raw_gmacs", "gmacs")]
    step, tried = summary["chosen_step"], dict(summary["tried"])
    loss = _format(tried.get(step), ".4f")
    lines.append([summary["plan"], *cells, f"{step:,} of {summary['steps']:,}", loss])
  steps, images, minutes = (sum(s[key] for s in front) for key in ("steps", "images", "minutes"))
  text = (
    f"One search for all budgets: {steps:,} steps on {images:,} images, {minutes:.1f} minutes. "
    "Each goes on from the rates of the one before. Below is the last plan; all are in `plans/`."
  )
  return f"{_table(heads, lines)}\n\n{text}"


def _chosen_text(summary: Mapping[str, Any]) -> list[str]:
  """Which of the plans that the search passed through was kept."""
  tried = dict(summary.get("tried") or [])
  if not tried:
    return []
  step = summary["chosen_step"]
  return [
    f"Kept: the plan of step {step:,} with a loss of {tried[step]:.4f}, the least of the "
    f"{len(tried)} that were tried (steps {', '.join(f'{s:,}' for s in tried)})"
  ]


def _slim_text(summary: Mapping[str, Any]) -> str:
  def percent(values: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in values.items())

  asked = f"Shares asked for: {percent(summary['shares'])}"
  if summary["budget_gmacs"]:
    share = 100 * next(iter(summary["shares"].values()))
    asked = (
      f"Budget: {number(summary['budget_gmacs'])} GMACs, met by a share of {share:.1f} % of the "
      "masks of each kind that was searched"
    )
  trained = (
    f"{summary['steps']:,} steps on {summary['images']:,} images, {summary['minutes']:.1f} minutes"
  )
  lines = [
    trained if summary["steps"] else "An earlier search's masks and weights, cut anew",
    asked,
    f"Shares reached: {percent(summary['kept'])}",
    f"{number(summary['gmacs'])} GMACs, {100 * summary['of_dense']:.1f} % of the dense model's; "
    f"{summary['params_m']:.4g} M parameters",
    f"By the authors' own formulas: {number(summary['authors_gmacs'])} GMACs, "
    f"{summary['authors_params_m']:.4g} M parameters",
    summary["timm"],
  ]
  return "\n".join(f"- {line}" for line in lines)


def _plan_text(
  plan_json: Mapping[str, Any] | None,
  counts: Sequence[tuple[int, int]],
  summary: Mapping[str, Any] | None,
) -> tuple[str, str]:
  """A line, and a table of the layers: widths if they are slimmed, tokens if some are removed."""
  columns: dict[str, list[str]] = {}
  text = ""
  if plan_json is not None:
    gmacs = number(plan_json["gmacs"])
    text = f"For `{plan_json['variant']}` with {plan_json['num_tokens']} tokens: {gmacs} GMACs."
    columns |= _width_columns(plan_json["layers"])
  if summary is not None or not columns or _removes(plan_json):
    text += " Tokens after pruning and after merging in each layer, prefix included."
    num_tokens = None if plan_json is None else plan_json["num_tokens"]
    columns |= _token_columns(num_tokens, counts, summary)
  layers = map(str, range(1, 1 + len(next(iter(columns.values())))))
  return text.strip(), _table(
    ["layer", *columns], list(zip(layers, *columns.values(), strict=True))
  )


def _removes(plan_json: Mapping[str, Any] | None) -> bool:
  """Whether a layer prunes or merges."""
  layers = (plan_json or {}).get("layers", [])
  return any(layer.get("reduce", {}).get("type") != "keep_all" for layer in layers)


def _width_columns(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
  """What slimmed layers keep, zeros that fill up aside."""
  columns: dict[str, list[str]] = {}
  if "attn_index" in layers[0]:
    heads = [[sum(unit >= 0 for unit in head) for head in layer["attn_index"]] for layer in layers]
    columns["heads"] = [str(len(dims)) for dims in heads]
    columns["dimensions of each"] = [" ".join(map(str, dims)) for dims in heads]
    hidden = [sum(unit >= 0 for unit in layer["mlp_index"]) for layer in layers]
    columns["hidden units"] = [str(count) for count in hidden]
  kept = [layer.get("select", {}).get("positions") for layer in layers]
  if any(kept):
    columns["tokens kept"] = ["all" if k is None else str(len(k)) for k in kept]
  return columns


def _token_columns(
  num_tokens: int | None,
  counts: Sequence[tuple[int, int]],
  summary: Mapping[str, Any] | None,
) -> dict[str, list[str]]:
  """The plan as learnt beside the adjusted one, or the plan that was given."""
  if summary is not None:
    plans = {"learnt: ": summary["raw_counts"], "adjusted: ": summary["counts"]}
  else:
    plans = {"": counts}
  columns = {}
  for prefix, counts in plans.items():
    pruned, merged = zip(*tokens_left(counts, num_tokens), strict=True)
    columns[f"{prefix}after pruning"] = [str(count) for count in pruned]
    columns[f"{prefix}after merging"] = [str(count) for count in merged]
  return columns


def _figures(workdir: pathlib.Path) -> list[str]:
  """The figures that are there, each with its caption."""
  names = {path.name for path in (workdir / "figures").glob("*.png")}
  known = [name for name in CAPTIONS if name in names]
  others = sorted(names - set(known))
  captions = [CAPTIONS[name] for name in known]
  captions += [name.removesuffix(".png").replace("_", " ").capitalize() for name in others]
  pairs = zip(known + others, captions, strict=True)
  return [f"![{caption}](figures/{name})\n\n*{caption}*" for name, caption in pairs]


def _versions(versions: Mapping[str, str]) -> str:
  return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A Markdown table, its columns lined up; numbers to the right."""
  widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
  rules = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (w - 1)}:" for w in widths[1:])]
  return "\n".join(
    "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
    for line in [heads, rules, *lines]
  )


def _format(value: float | None, spec: str) -> str:
  return _MISSING if value is None else format(value, spec)
