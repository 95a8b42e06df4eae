"""Writes the tables of README.md and docs from stored results.

    python tools/results_tables.py [--check]

A table is between the lines `<!-- table NAME -->` and `<!-- end -->`. Its numbers come from a file
in docs/results, which a run or a tool wrote. With `--check`, nothing is written, and the exit
status is 1 if a table does not match its results.
"""

import argparse
import functools
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/results.md")
_PLACE = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

MISSING = "–"

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

# Readable names of methods.
LABELS = {
  "diffrate": "searched, tokens",
  "diffrate[loss=labels]": "searched, tokens, with labels",
  "diffrate[what=widths]": "searched, widths",
  "diffrate[what=both]": "searched, tokens and widths",
  "tome": "ToMe",
  "evit": "EViT",
  "uniform": "one count, pruned",
  "uniform_merge": "one count, merged",
  "linear": "linear, pruned",
  "linear_merge": "linear, merged",
  "random": "random",
}

_IN_README = (
  "dense",
  "the authors' plan",
  "searched, tokens",
  "searched, tokens and widths",
  "ToMe",
  "linear, merged",
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="write nothing, compare")
  args = parser.parse_args(argv)
  stale = 0
  for name in DOCUMENTS:
    path = ROOT / name
    there = path.read_text(encoding="utf-8")
    wanted = filled(there)
    if there != wanted:
      stale += 1
      print(f"{name}: {'differs from docs/results' if args.check else 'written'}")
      if not args.check:
        path.write_text(wanted, encoding="utf-8")
  return int(args.check and stale > 0)


def filled(text: str) -> str:
  """Returns a document with every table filled in from its results."""
  return _PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[4], text)


def stored(file: str) -> list[Row]:
  """Returns the rows of a file in docs/results."""
  found: list[Row] = json.loads((ROOT / "docs/results" / file).read_text("utf-8"))["rows"]
  return found


def table(columns: Columns, rows: Sequence[Row]) -> str:
  """Returns a Markdown table, with the first column left-aligned and the others right-aligned."""
  rules = ["---"] + ["--:"] * (len(columns) - 1)
  lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
  for row in rows:
    lines.append(f"| {' | '.join(column(row) for column in columns.values())} |")
  return "\n".join(lines) + "\n"


def label(row: Row) -> str:
  """Returns a readable name of a row."""
  if "plan" in row:
    return "the authors' plan"
  method = row["name"].partition("@")[0].removesuffix("+finetune")
  known = LABELS.get(method, method)
  return f"{known}, tuned" if "+finetune" in row["name"] else known


def number(key: str, spec: str) -> Callable[[Row], str]:
  """Returns a column of a number, with its standard error if one is stored."""

  def column(row: Row) -> str:
    value, error = row.get(key), row.get(f"{key}_se")
    if value is None:
      return MISSING
    return f"{value:{spec}}" + ("" if error is None else f" ± {error:{spec.removeprefix('+')}}")

  return column


def plain(key: str, spec: str) -> Callable[[Row], str]:
  """Returns a column of a number without its standard error."""
  return lambda row: MISSING if row.get(key) is None else f"{row[key]:{spec}}"


def differences(reference: str, points: str) -> dict[str, Callable[[Row], str]]:
  """Returns the columns of paired differences from a reference; `points` formats those of top-1."""
  return {
    f"top-1 over {reference}": number("top1_over_reference", points),
    f"cross-entropy over {reference}": number("loss_over_reference", "+.4f"),
  }


def costs(rows: Sequence[Row]) -> list[list[Row]]:
  """Groups rows whose costs are within 1 % of each other, by decreasing cost."""
  groups: list[list[Row]] = []
  for row in sorted(rows, key=lambda row: -row["gmacs"]):
    if not groups or row["gmacs"] < 0.99 * groups[-1][0]["gmacs"]:
      groups.append([])
    groups[-1].append(row)
  return groups


def pivot(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
  """Returns a table with a line for each method and a column for each cost.

  Args:
    rows: Rows, at most one for each method and cost. Methods keep their order.
    cell: Returns the text of a row's cell.
  """
  lines: dict[str, dict[str, str]] = {label(row): {} for row in rows}
  columns: dict[str, Callable[[Row], str]] = {"GMACs": lambda line: line["label"]}
  for group in costs(rows):
    head = f"{statistics.median(row['gmacs'] for row in group):.3f}"
    columns[head] = lambda line, head=head: line.get(head, MISSING)
    for row in group:
      lines[label(row)][head] = cell(row)
  return table(columns, [{"label": name, **cells} for name, cells in lines.items()])


def photos() -> str:
  """Returns accuracy and cross-entropy of all plans of the comparison on photos."""
  return pivot(stored("photos.json"), _accuracy)


def _accuracy(row: Row) -> str:
  return f"{row['top1']:.1f} / {row['loss']:.3f}"


def photos_differences(key: str, spec: str) -> str:
  """Returns the paired differences of a metric from the search of tokens."""
  rows = [row for row in stored("photos.json") if row.get("reference", "").startswith("diffrate@")]
  return pivot(rows, number(f"{key}_over_reference", spec))


def photos_searches() -> str:
  """Returns minutes and parameters of the searches on photos."""
  searched = [row for row in stored("photos.json") if row.get("minutes")]
  return pivot(searched, lambda row: f"{row['minutes']:.1f} / {row['params_m']:.2f}")


def reached() -> str:
  """Returns the part of that comparison that README shows."""
  rows = [row for row in stored("photos.json") if label(row) in _IN_README]
  return pivot([row for row in rows if row["gmacs"] < 0.66 or row["name"] == "dense"], _accuracy)


def clip() -> str:
  """Returns results for embeddings of CLIP's image tower."""
  columns = {
    "plan": label,
    "GMACs": plain("gmacs", ".2f"),
    "params (M)": plain("params_m", ".1f"),
    "cosine to dense": plain("cosine", ".4f"),
    "top-1 of a linear classifier (%)": number("top1", ".1f"),
  }
  return table(columns, stored("clip.json"))


def quickstart() -> str:
  """Returns the results that the quick start prints."""
  rows = stored("quickstart.json")
  columns = {
    "model": name,
    "top-1 (%)": number("top1", ".1f"),
    "cross-entropy": number("loss", ".4f"),
    "of dense MACs": share(rows),
  }
  return table(columns, rows)


def small_off_the_shelf() -> str:
  """Returns results of the small model without fine-tuning."""
  rows = stored("off_the_shelf.json")
  columns = {
    "model": name,
    "top-1 (%)": plain("top1", ".2f"),
    "cross-entropy": plain("loss", ".4f"),
    **differences("DiffRate", "+.2f"),
    "of dense MACs": share(rows),
  }
  return table(columns, rows)


def small_finetuned() -> str:
  """Returns results of the small model, fine-tuned under every method."""
  rows = stored("finetuned.json")
  columns = {
    "method": lambda row: name(row).partition("+")[0],
    "top-1 (%)": number("top1", ".2f"),
    "cross-entropy": number("loss", ".4f"),
    **differences("DiffRate", "+.2f"),
    "of dense": share(rows),
    "params (M)": plain("params_m", ".4g"),
  }
  return table(columns, rows)


def small_ablation() -> str:
  """Returns the effect of each part of the search on the small model."""
  columns = {
    "search": lambda row: f"`{name(row).partition('@')[0]}`",
    "top-1 (%)": number("top1", ".2f"),
    "cross-entropy": number("loss", ".4f"),
    **differences("the first", "+.2f"),
  }
  return table(columns, stored("ablation.json"))


def name(row: Row) -> str:
  """Returns a row's name as a run prints it."""
  return str(row["name"])


def share(rows: Sequence[Row]) -> Callable[[Row], str]:
  """Returns a column of the share of the dense model's multiply-accumulates."""
  dense = next(row["gmacs"] for row in rows if row["name"] == "dense")
  return lambda row: f"{100 * row['gmacs'] / dense:.1f} %"


TABLES = {
  "photos": photos,
  "photos_top1": functools.partial(photos_differences, "top1", "+.1f"),
  "photos_loss": functools.partial(photos_differences, "loss", "+.3f"),
  "photos_searches": photos_searches,
  "reached": reached,
  "clip": clip,
  "quickstart": quickstart,
  "small_off_the_shelf": small_off_the_shelf,
  "small_finetuned": small_finetuned,
  "small_ablation": small_ablation,
}


if __name__ == "__main__":
  sys.exit(main())
