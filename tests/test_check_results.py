"""The check of the measured table against a new run."""

import pathlib
import runpy

import pytest

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "check_results.py"


@pytest.mark.parametrize(
  ("rows", "status", "said"),
  [
    ({"dense": 87.51, "tome@0.5": 85.0}, 0, "0 of 2 rows differ"),
    ({"dense": 87.51, "tome@0.5": 85.06}, 1, "85.06  <- differs"),
    ({"dense": 87.51, "evit@0.5": 85.0}, 1, "missing  <- differs"),
  ],
)
def test_rows_that_differ(rows, status, said, capsys):
  measured = {"rows": [{"name": "dense", "top1": 87.5}, {"name": "tome@0.5", "top1": 85.0}]}
  again = {"rows": [{"name": name, "top1": top1} for name, top1 in rows.items()]}
  assert runpy.run_path(str(TOOL))["compare"](measured, again) == status
  assert said in capsys.readouterr().out
