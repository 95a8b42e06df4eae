"""Runs the stages of an experiment, or resumes them.

The config is a file, or the name of one that ships with the package, such as quickstart. The
workdir is runs/NAME unless given. Every key of the config can be set by --config.KEY=VALUE; the
keys are listed in vitcomp_jax/config.py. The exit status is 0 on success, 2 for a mistake in the
command, the config, the data or the weights, or for a workdir that another run is using, 130 after
Ctrl-C, and 1 for anything else.
"""

import argparse
import difflib
import importlib.metadata
import importlib.resources
import inspect
import logging
import os
import pathlib
import re
import runpy
import signal
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

import absl.logging
import ml_collections

from vitcomp_jax import config as config_lib
from vitcomp_jax import paths
from vitcomp_jax.errors import UserError

_DISK_FULL = (
  "the disk is full; free some space and run the same command again: it goes on from the last "
  "whole checkpoint."
)


def main(argv: Sequence[str]) -> int:
  """Runs the config's stages; returns the exit status."""
  # This replaces the handler that absl installed.
  form = "%(asctime)s %(message)s"
  logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
  absl.logging.set_verbosity(absl.logging.WARNING)
  logging.getLogger("jax").setLevel(logging.WARNING)
  try:
    config, workdir = _parse(argv[1:])
    return _run(config, workdir)
  except KeyboardInterrupt as why:
    saved = f"{why}, and is saved" if str(why) else "what has a checkpoint is saved"
    return _say(f"interrupted; {saved}: the same command goes on from there.", 130)
  except Exception as error:
    if "No space left on device" in f"{error} {error.__cause__}":
      return _say(_DISK_FULL, 1)
    if not isinstance(error, UserError):
      raise
    return _say(str(error), 2)


def _run(config: config_lib.Config, workdir: pathlib.Path) -> int:
  """Runs the stages, and prints the table of measured models if there is one."""
  # Imported here, so that --help and mistakes in the command need not wait for JAX.
  import jax

  from vitcomp_jax import multihost
  from vitcomp_jax.reporting.tables import rows_table
  from vitcomp_jax.results import Result
  from vitcomp_jax.stages import run_stages
  from vitcomp_jax.training.preemption import Preempted

  def end(number: int, frame: types.FrameType | None) -> NoReturn:
    """Ends the run outside of training loops, which handle the signal themselves after a step."""
    del number, frame
    raise Preempted("the run ended")

  try:
    if jax.process_count() == 1:  # with several processes, JAX synchronises the end
      signal.signal(signal.SIGTERM, end)
    if config.compilation_cache:
      jax.config.update("jax_compilation_cache_dir", paths.expand(config.compilation_cache))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    run = run_stages(config, workdir, config.stages)
    table = run.workdir.path / "result.json"
    if table.exists() and multihost.is_first():
      print(rows_table(Result.read(table).rows).markdown())
    logging.info("done: %s", run.workdir.path)
  except Preempted as why:
    return _say(f"{why}, as it was asked to; everything is saved, the same command goes on.", 0)
  return 0


def _say(line: str, status: int) -> int:
  print(f"vitcomp_jax: {line}", file=sys.stderr)
  return status


_DISTRIBUTED = "one of several processes that Slurm, GKE or a TPU pod started together"


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise UserError(f"command line: {message}.")


def _parse(argv: Sequence[str]) -> tuple[config_lib.Config, pathlib.Path]:
  """Returns the config, with the changes from the command line, and the workdir."""
  parser = _Parser(
    prog="python -m vitcomp_jax.main",
    usage="%(prog)s --config NAME[:ARG] [--workdir DIR] [--config.KEY=VALUE ...]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--version", action="version", version=importlib.metadata.version("vitcomp_jax")
  )
  parser.add_argument("--config", metavar="NAME[:ARG]", required=True, help="the experiment")
  parser.add_argument("--workdir", type=pathlib.Path, help="folder of the run; default: runs/NAME")
  parser.add_argument("--distributed", action="store_true", help=_DISTRIBUTED)
  parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
  parser.add_argument("--num_processes", type=int, help="number of processes")
  parser.add_argument("--process_id", type=int, help="index of this process, from 0")
  known, rest = parser.parse_known_args(argv)
  name, _, arg = known.config.partition(":")
  overrides, file = _overrides(rest), _config_file(name)
  _initialize(known)
  values = config_lib.with_overrides(_read(file, arg or None), overrides)
  workdir = known.workdir or pathlib.Path("runs", file.stem)
  if workdir == pathlib.Path():
    raise UserError("--workdir: expected a folder of its own for the run, got the current one.")
  return config_lib.from_config_dict(values), workdir


def _initialize(known: argparse.Namespace) -> None:
  """Joins the other processes, if there are any."""
  explicit = known.coordinator, known.num_processes, known.process_id
  if not known.distributed and explicit == (None, None, None):
    return
  if not known.distributed and None in explicit:
    raise UserError(
      "command line: expected --coordinator, --num_processes and --process_id together, or "
      "--distributed alone where a cluster can be asked for them."
    )
  import jax

  try:
    # The timeout is long because a machine that is paused for a while, or swaps, has not crashed.
    jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=300)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"command line: the other processes cannot be joined ({_first_line(error)}); expected "
      "Slurm, GKE or a TPU pod for --distributed alone, or --coordinator, --num_processes and "
      "--process_id."
    ) from error


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0]


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
  """Returns the values of --config.KEY=VALUE, or --config.KEY VALUE, by key."""
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


def _config_file(name: str) -> pathlib.Path:
  """Returns the config file at a path, or the packaged config of that name.

  `configs/NAME.py` also counts as a name, so that documented commands work without a checkout.
  """
  path = pathlib.Path(paths.expand(name))
  if path.is_file():
    return path
  folder = pathlib.Path(str(importlib.resources.files("vitcomp_jax.configs")))
  shipped = {file.stem: file for file in folder.glob("*.py")}
  for helper in ("__init__", "common"):
    del shipped[helper]
  if path.parent in (pathlib.Path(), pathlib.Path("configs")) and path.stem in shipped:
    return shipped[path.stem]
  near = difflib.get_close_matches(path.stem, shipped, n=1)
  hint = f"the nearest name is {near[0]}" if near else f"these ship: {', '.join(sorted(shipped))}"
  raise UserError(
    f"--config: expected a file, or the name of a config that ships with the package, got {name!r};"
    f" {hint}."
  )


def _read(path: pathlib.Path, arg: str | None) -> dict[str, Any]:
  """Runs a config file's `get_config` and returns its values."""
  try:
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
      raise UserError(f"{path}: expected a function get_config, got none.")
    if arg and not inspect.signature(get_config).parameters:
      raise UserError(f"--config: {path.name} takes nothing behind a colon, got {arg!r}.")
    config = get_config(arg) if arg else get_config()
  except UserError:
    raise
  # A config file may raise any exception; the user needs its message.
  except (Exception, SystemExit) as error:
    what = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: {' '.join(what.split())}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"{path}: expected get_config to return a ConfigDict, got {config!r}.")
  return dict(config.to_dict())


if __name__ == "__main__":
  _status = main(sys.argv)
  if _status == 130:
    # XLA may still be compiling in another thread, which would crash while Python shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)
  sys.exit(_status)
