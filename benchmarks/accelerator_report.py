"""Computes ratios of the measurements of `accelerator.py`, and formats its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

# Each ratio divides the time of the second by that of the first, using the fastest of their rows.
_DENSE, _PLAN = ("dense cudnn", "dense xla"), ("plan cudnn", "plan xla")
_COMPILED, _EAGER = ("torch dense compiled",), ("torch dense eager",)
RATIOS = {
  "dense over compiled PyTorch": (_DENSE, _COMPILED),
  "dense over eager PyTorch": (_DENSE, _EAGER),
  "plan over dense": (_PLAN, _DENSE),
  "plan over compiled PyTorch, dense": (_PLAN, _COMPILED),
  "plan over PyTorch's plan": (_PLAN, ("torch plan eager",)),
  "cudnn over xla, dense": (_DENSE[:1], _DENSE[1:]),
  "cudnn over xla, plan": (_PLAN[:1], _PLAN[1:]),
  "tile 8 over plan": (("tile 8 cudnn", "tile 8 xla"), _PLAN),
  "tile 16 over plan": (("tile 16 cudnn", "tile 16 xla"), _PLAN),
  "ToMe over DiffRate": (("tome cudnn", "tome xla"), _PLAN),
  "EViT over DiffRate": (("evit cudnn", "evit xla"), _PLAN),
  "search step in dense passes": (_DENSE, ("search xla",)),
}
CHOOSING = "share of choosing and merging"


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Computes the ratios of every part for which the rows were measured.

  Args:
    rows: Rows of the JSON file.

  Returns:
    For each part, its name and its ratios by name; above 1, the first of the two is faster.
    `CHOOSING` is the share of the plan's time that its token counts do not explain.
  """
  by_part: dict[str, dict[str, float]] = {}
  for row in rows:
    by_part.setdefault(row["part"], {})[row["name"]] = row["median_ms"]
  found = []
  for part, ms in by_part.items():
    values = {}
    for name, (above, below) in RATIOS.items():
      faster, slower = ([ms[row] for row in side if row in ms] for side in (above, below))
      if faster and slower:
        values[name] = round(min(slower) / min(faster), 3)
    for plan in _PLAN:
      first = plan.replace("plan", "first tokens")
      if plan in ms and first in ms:
        values[CHOOSING] = round(1 - ms[first] / ms[plan], 3)
    found.append({"part": part, **values})
  return found


def markdown(result: Mapping[str, Any]) -> str:
  """Formats the results as tables of rows, ratios, checks and skipped measurements."""
  about = result["about"]
  versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
  lines = [f"{about['device']}; {versions}.", ""]
  columns = ("part", "name", "gmacs", "median_ms", "iqr_ms", "images_per_second", "timings")
  lines += _table(columns, result["rows"])
  for values in result["ratios"]:
    pairs = [(name, value) for name, value in values.items() if name != "part"]
    if pairs:
      lines += [f"{values['part']}:", ""]
      lines += _table(("ratio", "value"), [dict(ratio=name, value=value) for name, value in pairs])
  lines += _table(("name", "distance", "limit", "agrees"), result["checks"])
  lines += _table(("part", "name", "why"), result["skipped"])
  return "\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the lines of a table; an empty list if there are no rows."""
  if not rows:
    return []
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  for row in rows:
    cells = [str(row.get(column, "")).replace("|", "/") for column in columns]
    lines.append("| " + " | ".join(cells) + " |")
  return [*lines, ""]
