"""JSON without NaN and without a key that stands twice."""

import json

import numpy as np
import pytest

from vitcomp_jax import strict_json
from vitcomp_jax.atomic import write_json
from vitcomp_jax.metrics import MetricsWriter, read_metrics


def test_what_is_not_finite_is_not_written(tmp_path):
  path = tmp_path / "result.json"
  write_json(path, {"loss": 1.5})
  for value in (float("nan"), float("inf"), -float("inf")):
    with pytest.raises(ValueError, match="not JSON compliant"):
      write_json(path, {"rows": [{"loss": value}]})
  assert json.loads(path.read_text()) == {"loss": 1.5}
  assert list(tmp_path.iterdir()) == [path]


def test_figures_that_are_not_finite_are_null(tmp_path):
  figures = {"loss": np.float32(np.nan), "expected": np.array([1.0, np.inf]), "gmacs": 2.0}
  with MetricsWriter(tmp_path, "search", 0, 3) as metrics:
    metrics.write(1, figures)
    metrics.write(2, {"loss": 0.5})
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"stage": "slim", "step": 1, "loss": NaN}\n')
  with MetricsWriter(tmp_path, "search", 1, 3):  # which writes anew what it keeps
    pass
  lines = path.read_text().splitlines()
  records = [strict_json.loads(line) for line in lines]
  assert records == [*read_metrics(tmp_path, "search"), {"stage": "slim", "step": 1, "loss": None}]
  assert (records[0]["loss"], records[0]["expected"]) == (None, [1.0, None])
  assert records[0]["gmacs"] == 2.0


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ('{"a": 1, "b": 2, "a": 3}', "'a' more than once"),
    ('{"x": [{"b": 1, "b": 1}, {"c": 1, "a": 2, "c": 1}]}', "'b', 'c' more than once"),
    ("[NaN]", "NaN, which is no finite number"),
    ('{"x": -Infinity}', "-Infinity, which"),
    ("[1e999]", "1e999, which"),
    ("{", "Expecting"),
  ],
)
def test_what_would_be_passed_over_is_refused(text, said):
  with pytest.raises(ValueError, match=said):
    strict_json.loads(text)


def test_the_same_key_may_stand_in_several_objects():
  assert strict_json.loads('[{"a": 1.5}, {"a": {"a": -2}}]') == [{"a": 1.5}, {"a": {"a": -2}}]
