"""The command: `python -m vitcomp_jax.main --config configs/NAME.py[:ARG] [--workdir DIR]`."""

import logging
import pathlib
import re
import sys

import absl.logging
from absl import flags
from ml_collections import config_flags

from vitcomp_jax import config as config_lib
from vitcomp_jax.errors import UserError
from vitcomp_jax.stages import finish_stage
from vitcomp_jax.stages.run import open_run

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:ARG]")
_WORKDIR = flags.DEFINE_string("workdir", None, "where the run is kept; none: runs/NAME")

_DISK_FULL = (
  "the disk is full; free some space and run the same command again: it goes on from the last "
  "whole checkpoint."
)


def main(argv: list[str]) -> int:
  """Runs the config's stages; returns the exit status."""
  # absl has put a handler of its own there already.
  form = "%(asctime)s %(message)s"
  logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.getLogger("jax").setLevel(logging.WARNING)
  try:
    _run(_parse(argv))
  except Exception as error:
    if "No space left on device" in f"{error} {error.__cause__}":
      print(f"vitcomp_jax: {_DISK_FULL}", file=sys.stderr)
      return 1
    if not isinstance(error, UserError):
      raise
    print(f"vitcomp_jax: {error}", file=sys.stderr)
    return 2
  return 0


def _parse(argv: list[str]) -> config_lib.Config:
  for argument in argv[1:]:
    key = re.match(r"--?config\.([\w.]+)", argument)
    if key and key[1] not in config_lib.all_keys():
      raise UserError(config_lib.unknown_key(key[1]))
  try:
    rest = flags.FLAGS(argv)[1:]
    config = _CONFIG.value and _CONFIG.value.to_dict()
  except UserError:
    raise
  # A config file may raise anything; what it says is what the user needs to know.
  except Exception as error:
    raise UserError(f"command line: {' '.join(str(error).split())}") from error
  if rest:
    raise UserError(f"command line: expected only flags, got {rest[0]!r}.")
  if config is None:
    raise UserError("--config: expected configs/NAME.py, got none.")
  return config_lib.from_config_dict(config)


def _run(config: config_lib.Config) -> None:
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  run = open_run(config, pathlib.Path(_WORKDIR.value or f"runs/{name.split('.')[0]}"))
  for stage in config.stages:
    finish_stage(run, stage)
  logging.info("done: %s", run.workdir / "report.md")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
