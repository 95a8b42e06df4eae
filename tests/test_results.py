"""Results are what their files say, and a damaged file is one line."""

import json

import pytest

from vitcomp_jax.errors import UserError
from vitcomp_jax.results import BenchmarkResult, RandomSchedules, Result, Row, SearchResult

ABOUT = {"dataset": "d", "split": "s", "examples": 3, "device": "cpu", "versions": {"jax": "1"}}


@pytest.mark.parametrize(
  ("row", "name", "series"),
  [
    (Row(method="dense"), "dense", "dense"),
    (Row(method="tome", budget=0.5), "tome@0.5", "tome"),
    (Row(method="dense", variant="finetune"), "dense+finetune", "dense+finetune"),
    (Row(method="evit", budget=0.65, variant="finetune"), "evit+finetune@0.65", "evit+finetune"),
    (Row(method="vit_slim", variant="masked"), "vit_slim@masked", "vit_slim@masked"),
    (Row(method="uniform", variant="plan"), "uniform@plan", "uniform@plan"),
    (Row(method="diffrate", plan="my/plan@2.json"), "my/plan@2.json", "diffrate (given plans)"),
  ],
)
def test_a_row_is_named_after_its_fields(row, name, series):
  assert (row.name, row.series) == (name, series)
  assert Row.from_json(json.loads(json.dumps(row.to_json())), "here") == row


def test_a_file_is_read_as_it_was_written(tmp_path):
  row = Row(method="dense", top1=90.0, images_per_second={"1": 2.5}, top1_of_seeds=(1.0, 2.0))
  random = {"0.5": RandomSchedules(2, 3, {"0.5": 1.0}, {"0.5": 2.0})}
  result = Result(**ABOUT, rows=(row,), random=random)
  result.write(tmp_path / "result.json")
  assert Result.read(tmp_path / "result.json") == result
  values = json.loads((tmp_path / "result.json").read_text())
  assert values["rows"][0] == {
    "name": "dense",
    "method": "dense",
    "top1": 90.0,
    "images_per_second": {"1": 2.5},
    "top1_of_seeds": [1.0, 2.0],
  }
  counts = ((9, 8), (7, 7))
  one = SearchResult("a", 1, 2, 0.5, 1, counts, counts, 2.0, 1.0, tried=((1, 0.5),))
  both = SearchResult("b", 1, 2, 0.5, 1, counts, counts, 2.0, 1.0, front=(one, one))
  assert SearchResult.from_json(json.loads(json.dumps(both.to_json())), "here") == both


def test_rows_from_before_they_had_a_method_keep_their_names():
  result = Result.from_json({**ABOUT, "rows": [{"name": "tome@0.5", "top1": 80}]}, "here")
  assert result.rows[0].name == "tome@0.5" and result.rows[0].top1 == 80.0


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("{", "cannot be read"),
    ("[]", "expected a JSON object"),
    ("{}", "expected the fields of a Result"),
    (json.dumps({**ABOUT, "examples": "many"}), "examples: expected int, got 'many'"),
    (json.dumps({**ABOUT, "examples": True}), "examples: expected int, got True"),
    (json.dumps({**ABOUT, "rows": {}}), "rows: expected tuple"),
    (json.dumps({**ABOUT, "rows": [7]}), "rows: expected an object, got 7"),
    (json.dumps({**ABOUT, "rows": [{"top1": 1.0}]}), "rows: expected the fields of a Row"),
    (json.dumps({**ABOUT, "rows": [{"name": "a", "top1": "b"}]}), "top1: expected float, got 'b'"),
  ],
)
def test_a_damaged_file_is_one_line(text, said, tmp_path):
  path = tmp_path / "result.json"
  path.write_text(text)
  with pytest.raises(UserError, match=said) as error:
    Result.read(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(UserError):
    BenchmarkResult.read(path)
