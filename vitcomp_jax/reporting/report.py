"""The report of a run, `report.md` and `report.html`: what a person reads first.

The table and the text show measured figures only.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax import multihost
from vitcomp_jax.atomic import write_text
from vitcomp_jax.reporting import render
from vitcomp_jax.reporting.plots import number, tokens_left
from vitcomp_jax.reporting.render import Block, Heading, Items, Picture, Table, Text

CAPTIONS = {
  "schedule": (
    "Stair chart of tokens over layers",
    "Tokens that each layer leaves, after pruning and after merging.",
  ),
  "plans": (
    "Stair chart of tokens over layers, for several plans",
    "The same for this run's plans beside those that `config.visualize.plans` names.",
  ),
  "accuracy": (
    "Scatter chart of accuracy over GMACs",
    "Top-1 accuracy against compute, one point per row of the table.",
  ),
  "published": (
    "Scatter chart of accuracy over GMACs, with published points",
    "The same beside published figures (open markers, dotted), which were not measured here: "
    "top-1 on ImageNet-1k as their sources state it, with the GMACs that they state, or, where "
    "they state none, those of this library's counter.",
  ),
  "widths": (
    "Bar chart of kept shares over layers",
    "What each slimmed layer keeps, in percent of the dense one's.",
  ),
  "units": (
    "Map of kept units, one line for each layer",
    "The masks after the cut: which dimensions of each head and which hidden units are kept.",
  ),
  "patches": (
    "Maps of kept patches, one for each layer",
    "The patches that each layer keeps (dark), and how many.",
  ),
  "masks": (
    "Maps of the masks' values over steps",
    "The values of the soft masks over the steps of the slimming search: how many percent of them "
    "lie where.",
  ),
  "search": (
    "Line charts of loss and compute over steps",
    "Loss and compute over the steps of the search; the dashed line is the budget.",
  ),
  "token_maps": (
    "Images with their tokens after a quarter, half, three quarters and all of the layers",
    "What became of the patches of a few images: patches that share a token are painted in their "
    "mean colour and outlined, pruned ones are dark.",
  ),
  "token_maps_by_layer": (
    "Images with their tokens after each layer",
    "Which patches share a token (outlined, in their mean colour) and which are pruned (dark), "
    "after each layer that removes some.",
  ),
  "attention": (
    "Maps of the attention of CLS, one for each layer",
    "How much attention CLS pays each patch, from dark blue (little) to yellow (much).",
  ),
}
"""Titles and captions of the plots in `figures/`, in the order of the report."""

_ABSENT = {
  "schedule": "Schedules and token maps: no model of this run removes tokens.",
  "accuracy": (
    "Accuracy: no row has one; the stages `evaluate` and `compare` measure it, on labelled images."
  ),
  "published": (
    "Published figures: there are some for DeiT, MAE and ViT on ImageNet-1k, none for this model "
    "on these data."
  ),
  "search": "Search curves: this run itself has searched no token counts.",
  "widths": "Widths and masks: no plan of this run is slimmed.",
  "attention": "Pictures of images: `config.visualize.images` is 0, or the data hold none.",
}
"""Why figures are not there."""

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
  slim_summary: Mapping[str, Any] | None = None,
  complete: bool = False,
) -> None:
  """Writes `report.md` and `report.html`.

  Args:
    workdir: Where the report goes and `figures/` may be.
    result: The content of result.json.
    plan_json: The content of plan.json, if there is a plan.
    counts: Tokens after pruning and after merging in each layer of the plan.
    search_summary: What the search reported, if there was one in this run.
    slim_summary: What the slimming reported, if there was one in this run.
    complete: Whether all figures are drawn, and those that are not there are to be explained.
  """
  blocks = [*_title(result), _rows_table(result["rows"])]
  if slim_summary is not None:
    blocks += [Heading("Slimming"), _slim_items(slim_summary)]
  if search_summary is not None:
    blocks += [Heading("Search"), *_search_blocks(search_summary)]
  if plan_json is not None or search_summary is not None:
    blocks += [Heading("Plan"), *_plan_blocks(plan_json, counts, search_summary)]
  benchmark = workdir / "benchmark.json"
  if benchmark.exists():
    blocks += [Heading("Speed"), *_speed_blocks(json.loads(benchmark.read_text()))]
  _write(workdir, blocks, result, complete)


def _write(
  workdir: pathlib.Path, blocks: list[Block], result: Mapping[str, Any], complete: bool
) -> None:
  """Adds what all reports end with, and writes both files."""
  figures = _figures(workdir)
  if figures:
    blocks += [Heading("Figures"), *figures]
  if complete:
    there = {figure.name for figure in figures}
    reasons = [reason for name, reason in _ABSENT.items() if name not in there]
    blocks += [Heading("Not in this report"), Items(reasons)] if reasons else []
  versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
  blocks += [Heading("Versions"), Text(versions)]
  if multihost.is_first():  # The others have no figures to read.
    write_text(workdir / "report.md", render.to_markdown(blocks))
    title = f"Results on {result['dataset']}"
    write_text(workdir / "report.html", render.to_html(title, blocks))


def _speed_blocks(benchmark: Mapping[str, Any]) -> list[Block]:
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
  return [Table("Speed by model and batch size.", heads, lines), Text(text)]


def write_comparison(
  workdir: pathlib.Path, result: Mapping[str, Any], complete: bool = False
) -> None:
  """Writes the report of a comparison, from the content of its result.json."""
  rows = result["rows"]
  dense = rows[0]["gmacs"]
  heads = [
    "model",
    "top-1 (%)",
    "cross-entropy",
    "top-1 over reference",
    "cross-entropy over reference",
  ]
  heads += ["GMACs", "of dense", "params (M)"]
  lines = []
  for row in rows:
    figures = [_with_error(row, "top1", ".2f"), _with_error(row, "loss", ".4f")]
    figures += [
      _with_error(row, "top1_over_reference", "+.2f"),
      _with_error(row, "loss_over_reference", "+.4f"),
    ]
    share = f"{100 * row['gmacs'] / dense:.1f} %"
    lines.append([row["name"], *figures, number(row["gmacs"]), share, f"{row['params_m']:.4g}"])
  captions = []
  if any("top1_se" in row for row in rows):
    captions.append("± is the standard error over the examples.")
  if references := list(dict.fromkeys(row["reference"] for row in rows if "reference" in row)):
    captions.append(
      f"Differences are paired, example by example; the references are {', '.join(references)}."
    )
  if any("top1_of_seeds" in row for row in rows):
    captions.append("What was searched with several seeds is their mean.")
  blocks = [*_title(result), Table(" ".join(captions), heads, lines)]
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
    blocks.append(Text(f"{line}."))
  _write(workdir, blocks, result, complete)


def _with_error(row: Mapping[str, Any], key: str, spec: str) -> str:
  if key not in row:
    return _MISSING
  text = f"{row[key]:{spec}}"
  # Of a single example there is no error.
  return f"{text} ± {row[f'{key}_se']:{spec.removeprefix('+')}}" if f"{key}_se" in row else text


def _title(result: Mapping[str, Any]) -> list[Block]:
  split, examples = result["split"], result["examples"]
  about = f"Split `{split}`, {examples:,} examples, on {result['device']}."
  return [Heading(f"Results on {result['dataset']}", 1), Text(about)]


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> Block:
  """One line per row; a column that no row has is left out."""
  if not rows:
    return Text("No model was measured: the stage `evaluate` has not run.")
  dense = next((row.get("gmacs") for row in rows if row["name"] == "dense"), None)
  heads = ["model", *_FIGURES.values(), "GMACs", "of dense", "params (M)"]
  batches = sorted({b for row in rows for b in row.get("images_per_second") or {}}, key=int)
  heads += [f"images/s, batch {batch}" for batch in batches]
  cells = [_row_cells(row, dense, batches) for row in rows]
  shown = [i for i in range(len(heads)) if any(line[i] != _MISSING for line in cells)]
  caption = "Measured in this run; nothing in it is copied from elsewhere."
  return Table(caption, [heads[i] for i in shown], [[line[i] for i in shown] for line in cells])


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


def _search_blocks(summary: Mapping[str, Any]) -> list[Block]:
  if "front" in summary:
    return [_front_table(summary["front"])]
  key, unit = ("latency_ms", "ms") if "latency_ms" in summary else ("gmacs", "GMACs")
  asked = f"{number(summary[f'budget_{key}'])} {unit}"
  if key == "latency_ms":
    asked += f" for a batch of {summary['batch']} on {summary['device']}, by `latency.json`"
  has_offset = summary.get("offset") is not None
  by = (
    f", by an offset of {summary['offset'] + 0.0:+.3g} on the expected counts" if has_offset else ""
  )
  lines = [
    f"{summary['steps']:,} steps on {summary['images']:,} images, {summary['minutes']:.1f} minutes",
    f"Budget: {asked}",
    *_chosen_text(summary),
    f"Plan as learnt: {number(summary[f'raw_{key}'])} {unit}",
    f"Plan adjusted to the budget: {number(summary[key])} {unit}{by}",
  ]
  return [Items(lines)]


def _front_table(front: Sequence[Mapping[str, Any]]) -> Table:
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
  return Table(text, heads, lines)


def _chosen_text(summary: Mapping[str, Any]) -> list[str]:
  """Describes which of the plans that the search passed through was kept."""
  tried = dict(summary.get("tried") or [])
  if not tried:
    return []
  step = summary["chosen_step"]
  return [
    f"Kept: the plan of step {step:,} with a loss of {tried[step]:.4f}, the least of the "
    f"{len(tried)} that were tried (steps {', '.join(f'{s:,}' for s in tried)})"
  ]


def _slim_items(summary: Mapping[str, Any]) -> Items:
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
  return Items(lines)


def _plan_blocks(
  plan_json: Mapping[str, Any] | None,
  counts: Sequence[tuple[int, int]],
  summary: Mapping[str, Any] | None,
) -> list[Block]:
  """A table of the layers: widths if they are slimmed, tokens if some are removed."""
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
  lines = list(zip(layers, *columns.values(), strict=True))
  return [Table(text.strip(), ["layer", *columns], lines)]


def _removes(plan_json: Mapping[str, Any] | None) -> bool:
  """Whether a layer prunes or merges."""
  layers = (plan_json or {}).get("layers", [])
  return any(layer.get("reduce", {}).get("type") != "keep_all" for layer in layers)


def _width_columns(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
  """Tabulates what slimmed layers keep, without the zeros that fill up."""
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


def _figures(workdir: pathlib.Path) -> list[Picture]:
  """The figures that are there, each with its caption."""
  folder = workdir / "figures"
  names = {path.stem for path in folder.glob("*.png")}
  known = [(name, *CAPTIONS[name]) for name in CAPTIONS if name in names]
  others = [(name, name.replace("_", " ").capitalize()) for name in sorted(names - set(CAPTIONS))]
  known += [(name, words, f"{words}.") for name, words in others]
  return [Picture(folder, *about) for about in known]


def _format(value: float | None, spec: str) -> str:
  return _MISSING if value is None else format(value, spec)
