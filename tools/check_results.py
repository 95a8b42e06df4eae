"""Measures the off-the-shelf table of docs/results.md again, and compares the results.

    python tools/prepare_fashion_mnist.py
    python tools/check_results.py [--workdir runs/again]

The tool uses the bundled weights and plans, and runs no search. The exit status is 1 if any top-1
accuracy differs by more than 0.05 points.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import vitcomp_jax as vc
from vitcomp_jax.configs import compare_fashion_mnist

MEASURED = pathlib.Path(__file__).parents[1] / "docs" / "results" / "off_the_shelf.json"
TOLERANCE = 0.05  # points of top-1


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/again", help="of the new run")
  args = parser.parse_args()
  return compare(
    json.loads(MEASURED.read_text()), vc.run_stage("compare", compare_config(), args.workdir)
  )


def compare_config() -> Any:
  return compare_fashion_mnist.get_config("again")


def compare(measured: Mapping[str, Any], again: Mapping[str, Any]) -> int:
  """Prints both accuracies of every row; returns 1 if any is missing or differs, otherwise 0."""
  found = {row["name"]: row["top1"] for row in again["rows"]}
  wrong = 0
  for row in measured["rows"]:
    now = found.get(row["name"])
    off = now is None or abs(now - row["top1"]) > TOLERANCE
    wrong += off
    text = "missing" if now is None else f"{now:.2f}"
    print(f"{row['name']:36} {row['top1']:6.2f} {text:>8}{'  <- differs' if off else ''}")
  print(f"{wrong} of {len(measured['rows'])} rows differ")
  return int(wrong > 0)


if __name__ == "__main__":
  sys.exit(main())
