"""Prints the collective operations of one training step, from the program that XLA compiles.

  python tools/collectives.py --config configs/diffrate_vits.py --stage search --devices 8

The step is compiled for virtual CPU devices, but not run. The data are synthetic and the weights
are random; everything else comes from the config. `--config.KEY=VALUE` overrides a key.
"""

import argparse
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")


def collectives(program: str) -> Iterator[tuple[str, int]]:
  """Yields the kind of each collective operation of a program, and the bytes of its results."""
  for line in program.splitlines():
    if match := _LINE.search(line):
      yield match[2], sum(_size(kind, sides) for kind, sides in _ARRAY.findall(match[1]))


def _size(kind: str, sides: str) -> int:
  bits = int(re.sub(r"\D", "", kind))
  return math.prod(int(side) for side in sides.split(",") if side) * bits // 8


def compiled_step(options: list[str], stage: str, batch_size: int) -> str:
  """Compiles a stage's first step, and returns the program's text."""
  # Imported here, after the number of devices has been set.
  from vitcomp_jax import main, stages
  from vitcomp_jax.runs.run import open_run

  options += ["--config.data.name=fake", "--config.model.weights=none"]
  options += [f"--config.{stage}.batch_size={batch_size}", "--config.data.train_examples=none"]
  config, _ = main._parse(options)
  with tempfile.TemporaryDirectory() as folder:
    run = open_run(config, pathlib.Path(folder) / "run")
    task = getattr(stages, stage).task(run)
    batch = next(task.batches(0))
    batch.pop("index")
    layout = run.inputs.layout
    placed = layout.put_state(task.state), layout.put_batch(batch), layout.put_state(task.fixed)
    return task.step_at(0).lower(*placed).compile().as_text()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--stage", required=True, choices=("pretrain", "slim", "search", "finetune"))
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument("--batch_size", type=int, default=16)
  known, rest = parser.parse_known_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={known.devices} --xla_backend_optimization_level=0"
  )
  found = list(
    collectives(compiled_step(["--config", known.config, *rest], known.stage, known.batch_size))
  )
  for kind in sorted({kind for kind, _ in found}):
    sizes = [size for k, size in found if k == kind]
    print(f"{kind:20} {len(sizes):4} operations {sum(sizes):12,} bytes")
  return 0


if __name__ == "__main__":
  sys.exit(main())
