"""Runs the stages of an experiment, or goes on with them.

The workdir is runs/NAME unless given. Every key of the config can be set by --config.KEY=VALUE; the
keys are listed in vitcomp_jax/config.py. The exit status is 0 for done, 2 for a mistake in the
command, the config, the data or the weights, and 1 for anything else.
"""

import argparse
import logging
import pathlib
import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import absl.logging
import ml_collections

from vitcomp_jax import config as config_lib
from vitcomp_jax.errors import UserError
from vitcomp_jax.stages import run_stages

_DISK_FULL = (
  "the disk is full; free some space and run the same command again: it goes on from the last "
  "whole checkpoint."
)


def main(argv: Sequence[str]) -> int:
  """Runs the config's stages; returns the exit status."""
  # absl has put a handler of its own there already.
  form = "%(asctime)s %(message)s"
  logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.getLogger("jax").setLevel(logging.WARNING)
  try:
    config, workdir = _parse(argv[1:])
    run_stages(config, workdir, config.stages)
    logging.info("done: %s", workdir)
  except KeyboardInterrupt:
    return _say("interrupted; the same command goes on from the last checkpoint.", 130)
  except Exception as error:
    if "No space left on device" in f"{error} {error.__cause__}":
      return _say(_DISK_FULL, 1)
    if not isinstance(error, UserError):
      raise
    return _say(str(error), 2)
  return 0


def _say(line: str, status: int) -> int:
  print(f"vitcomp_jax: {line}", file=sys.stderr)
  return status


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UserError(f"command line: {message}.")


def _parse(argv: Sequence[str]) -> tuple[config_lib.Config, pathlib.Path]:
  """The config, with what the command line changes of it, and the workdir."""
  parser = _Parser(
    prog="python -m vitcomp_jax.main",
    usage="%(prog)s --config configs/NAME.py[:ARG] [--workdir DIR] [--config.KEY=VALUE ...]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", metavar="FILE[:ARG]", required=True, help="the experiment")
  parser.add_argument("--workdir", type=pathlib.Path, help="where the run is kept; none: runs/NAME")
  known, rest = parser.parse_known_args(argv)
  file, _, arg = known.config.partition(":")
  overrides = _overrides(rest)
  values = config_lib.with_overrides(_read(pathlib.Path(file), arg or None), overrides)
  workdir = known.workdir or pathlib.Path("runs", pathlib.Path(file).stem)
  return config_lib.from_config_dict(values), workdir


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
  """The values of --config.KEY=VALUE, or --config.KEY VALUE, by key."""
  found = {}
  left = list(arguments)
  while left:
    argument = left.pop(0)
    match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL)
    if not match:
      raise UserError(
        f"command line: expected --config, --workdir or --config.KEY=VALUE, got {argument!r}."
      )
    key, value = match.groups()
    if value is None and not left:
      raise UserError(f"command line: expected --config.{key}=VALUE, got no value.")
    found[key] = left.pop(0) if value is None else value
  return found


def _read(path: pathlib.Path, arg: str | None) -> dict[str, Any]:
  """What a config file's `get_config` returns."""
  if not path.is_file():
    raise UserError(f"--config: expected a file such as configs/quickstart.py, got {str(path)!r}.")
  try:
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
      raise UserError(f"{path}: expected a function get_config, got none.")
    config = get_config(arg) if arg else get_config()
  except UserError:
    raise
  # A config file may raise anything; what it says is what the user needs to know.
  except (Exception, SystemExit) as error:
    what = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: {' '.join(what.split())}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"{path}: expected get_config to return a ConfigDict, got {config!r}.")
  return dict(config.to_dict())


if __name__ == "__main__":
  sys.exit(main(sys.argv))
