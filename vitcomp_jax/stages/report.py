"""The report of a run: `report.md`, what a person reads first. It shows measured figures only."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomp_jax.atomic import write_text
from vitcomp_jax.stages.figures import number, tokens_left

CAPTIONS = {
  "schedule.png": "Tokens that each layer leaves, after pruning and after merging.",
  "accuracy.png": "Top-1 accuracy against compute, one point per row of the table.",
  "widths.png": "What each slimmed layer keeps, in percent of the dense one's.",
  "patches.png": "The patches that each layer keeps.",
  "masks.png": (
    "The soft masks over the steps of the slimming search: median, and bands between deciles."
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
  search_summary: Mapping[str, Any] | None,
  budget_text: str,
  slim_summary: Mapping[str, Any] | None = None,
) -> None:
  """Writes `report.md`.

  Args:
    workdir: Where the report goes and `figures/` may be.
    result: The content of result.json.
    plan_json: The content of plan.json, if there is a plan.
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
    parts += ["## Plan", _plan_text(plan_json), _plan_table(plan_json, search_summary)]
  if plan_json is not None and "mlp_index" in plan_json["layers"][0]:
    parts += ["## Widths", _widths_table(plan_json)]
  figures = _figures(workdir)
  if figures:
    parts += ["## Figures", *figures]
  parts += ["## Versions", _versions(result.get("versions", {}))]
  write_text(workdir / "report.md", "\n\n".join(part for part in parts if part) + "\n")


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
    _format(row.get("params_m"), ".2f"),
  ]
  speeds = row.get("images_per_second") or {}
  return cells + [_format(speeds.get(batch), ".1f") for batch in batches]


def _search_text(summary: Mapping[str, Any], budget_text: str) -> str:
  asked = f"{number(summary['budget_gmacs'])} GMACs"
  has_offset = summary.get("offset") is not None
  by = f", by an offset of {summary['offset']:+.3g} on the expected counts" if has_offset else ""
  lines = [
    f"{summary['steps']:,} steps on {summary['images']:,} images, {summary['minutes']:.1f} minutes",
    f"Budget: {budget_text} ({asked})" if budget_text else f"Budget: {asked}",
    *_chosen_text(summary),
    f"Plan as learnt: {number(summary['raw_gmacs'])} GMACs",
    f"Plan adjusted to the budget: {number(summary['gmacs'])} GMACs{by}",
  ]
  return "\n".join(f"- {line}" for line in lines)


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
  def shares(values: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in values.items())

  lines = [
    f"{summary['steps']:,} steps on {summary['images']:,} images, {summary['minutes']:.1f} minutes",
    f"Asked for: {shares(summary['asked'])}; kept: {shares(summary['kept'])}",
    f"{number(summary['gmacs'])} GMACs, {100 * summary['of_dense']:.1f} % of the dense model's; "
    f"{summary['params_m']:.3f} M parameters",
    f"By the authors' own formulas: {number(summary['authors_gmacs'])} GMACs, "
    f"{summary['authors_params_m']:.3f} M parameters",
  ]
  return "\n".join(f"- {line}" for line in lines)


def _widths_table(plan_json: Mapping[str, Any]) -> str:
  heads = ["layer", "heads", "dimensions of each, zeros aside", "hidden units"]
  lines = []
  for index, layer in enumerate(plan_json["layers"], 1):
    dims = [str(sum(unit >= 0 for unit in head)) for head in layer["attn_index"]]
    hidden = sum(unit >= 0 for unit in layer["mlp_index"])
    lines.append([str(index), str(len(dims)), " ".join(dims), str(hidden)])
  return _table(heads, lines)


def _plan_text(plan_json: Mapping[str, Any] | None) -> str:
  counts = "Tokens after pruning and after merging in each layer, prefix included."
  if plan_json is None:
    return counts
  gmacs = number(plan_json["gmacs"])
  return (
    f"For `{plan_json['variant']}` with {plan_json['num_tokens']} tokens: {gmacs} GMACs. {counts}"
  )


def _plan_table(plan_json: Mapping[str, Any] | None, summary: Mapping[str, Any] | None) -> str:
  """Layer by layer: the plan as learnt beside the adjusted one, or the plan that was given."""
  num_tokens = None if plan_json is None else plan_json["num_tokens"]
  if summary is not None:
    plans = {"learnt: ": summary["raw_counts"], "adjusted: ": summary["counts"]}
  else:
    plans = {"": plan_counts(plan_json or {})}
  left = [tokens_left(counts, num_tokens) for counts in plans.values()]
  heads = ["layer"] + [f"{p}{what}" for p in plans for what in ("after pruning", "after merging")]
  lines = [
    [str(layer), *(str(count) for pair in pairs for count in pair)]
    for layer, pairs in enumerate(zip(*left, strict=True), 1)
  ]
  return _table(heads, lines)


def plan_counts(plan_json: Mapping[str, Any]) -> list[tuple[int, int]]:
  """The counts of a plan.json; where a layer has none, all tokens."""
  everything = plan_json.get("num_tokens", 0)
  counts = []
  for layer in plan_json.get("layers", []):
    values = layer if "prune_keep" in layer else layer.get("reduce", {})
    counts.append((values.get("prune_keep", everything), values.get("merge_keep", everything)))
  return counts


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
