"""Trains the same in several layouts on eight virtual devices; prints the losses as JSON.

  python -m tests.parallel_cases FOLDER CASES

CASES is a JSON object of lists [stage, mode, devices, {key: value}, ...]; a list with several such
quadruples goes on with a run that the one before left half way.
"""

import json
import pathlib
import sys

import vitcomp_jax as vc
from tests import tiny_config, tiny_main
from vitcomp_jax.metrics import read_metrics
from vitcomp_jax.training import preemption


def _run(stage: str, mode: str, devices: int, changes: dict, workdir: pathlib.Path, stop: int):
  config = tiny_config.get_config()
  config.update_from_flattened_dict(changes)
  config.parallel.mode, config.parallel.devices = mode, devices
  preemption.Preemption.reached = lambda self, step: step == stop
  try:
    vc.run_stage(stage, config, workdir)
  except preemption.Preempted:
    assert stop < 20


def main(folder: str, cases: str) -> None:
  tiny_main.tiny_variant()
  found = {}
  for name, runs in json.loads(cases).items():
    workdir = pathlib.Path(folder) / name
    for i, (stage, mode, devices, changes) in enumerate(runs):
      _run(stage, mode, devices, changes, workdir, 20 * (i + 1) // len(runs))
    found[name] = [record["loss"] for record in read_metrics(workdir, stage)]
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
