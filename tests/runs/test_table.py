"""The rows of a run are told apart by what made their models."""

import pytest

import vitcomp_jax as vc
from tests.stages.test_slim import tiny_config, tiny_variant  # noqa: F401
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.plans import Plan, make_plan
from vitcomp_jax.results import Row
from vitcomp_jax.runs import table
from vitcomp_jax.runs.run import Run, open_run


def _run(tmp_path, **evaluate) -> Run:
  config = tiny_config()
  config.evaluate.update(evaluate)
  return open_run(from_config_dict(config), tmp_path / "run")


def _plan(run: Run, **made_by) -> Plan:
  layers = vc.methods.tome.layers(run.inputs.spec, 2)
  return make_plan(run.inputs.spec, layers, made_by)


@pytest.mark.parametrize(
  ("made_by", "name"),
  [
    ({"method": "tome"}, "tome"),
    ({"method": "uniform"}, "uniform@plan"),  # which is also computed here
    ({"method": "dense"}, "dense@plan"),
    ({"method": ["tome"]}, "plan"),
    ({}, "plan"),
  ],
)
def test_a_plan_is_named_after_its_method(made_by, name, tmp_path):
  run = _run(tmp_path, baselines=("uniform",))
  assert table.plan_row(run, _plan(run, **made_by)).name == name


def test_a_plan_says_its_seed(tmp_path):
  run = _run(tmp_path)
  plan = _plan(run, method="diffrate", seed=3)
  assert table.plan_row(run, plan) == Row(method="diffrate", seed=3)


def test_published_plans_are_diffrates():
  for name in vc.list_plans():
    assert table.method_of(vc.load_plan(name)) == "diffrate"


def test_a_damaged_result_is_refused_in_one_line(tmp_path):
  run = _run(tmp_path)
  run.workdir.path.mkdir()
  path = run.workdir.path / "result.json"
  path.write_text('{"rows": 1}')
  with pytest.raises(vc.UserError, match=f"{path}: rows: expected"):
    table.result_so_far(run)
