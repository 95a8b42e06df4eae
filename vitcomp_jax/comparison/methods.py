"""Parses the methods of a comparison in a config: `NAME` or `NAME[KEY=VALUE,...]`."""

import pathlib
import re

from vitcomp_jax import paths
from vitcomp_jax.config import Config, from_config_dict, with_overrides
from vitcomp_jax.config_parsing import to_dict
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import schedules, untrained_schedules
from vitcomp_jax.models.spec import ViTSpec

SEARCHED = "diffrate"  # the searched method, and the reference for all others
SLIMMED = "vit_slim"  # the method that trains weights together with masks
_METHOD = re.compile(r"(\w+)(?:\[([^\[\]]+)\])?")


def parse(text: str, config: Config) -> tuple[str, Config]:
  """Returns a method's name, and its config.

  Args:
    text: Method such as `diffrate[actions=merge]`. Keys without a dot are those of `search`;
      dotted keys are those of any group.
    config: Config of the run, to which the keys are applied.

  Raises:
    UserError: If the text is invalid, or a key does not exist.
  """
  match = _METHOD.fullmatch(text)
  if not match:
    raise UserError(
      f"config.compare: expected a method such as diffrate[importance=cls], got {text!r}."
    )
  name, changes = match.groups()
  overrides = {}
  for change in changes.split(",") if changes else ():
    key, _, value = change.partition("=")
    overrides[key if "." in key else f"search.{key}"] = value
  return name, from_config_dict(with_overrides(to_dict(config), overrides))


def check_methods(config: Config, spec: ViTSpec) -> None:
  """Rejects methods that do not exist, or that need training but are compared untrained."""
  for text in config.compare.methods:
    name = _known("methods", text, config, spec, (SEARCHED,))
    if name not in (SEARCHED, *untrained_schedules()):
      raise UserError(f"config.compare.methods: {name} has to be trained; name it in `finetuned`.")
  for text in config.compare.finetuned:
    _known("finetuned", text, config, spec, (SEARCHED, SLIMMED))


def _known(key: str, text: str, config: Config, spec: ViTSpec, learning: tuple[str, ...]) -> str:
  name, own = parse(text, config)
  spec.importance(own.search.importance, "config.search.importance")  # raises
  if name not in {*schedules(), *learning}:
    known = ", ".join((*learning, *schedules()))
    raise UserError(f"config.compare.{key}: expected some of {known}, got {text}.")
  return name


def searched_before(config: Config, text: str, budget: float) -> list[pathlib.Path]:
  """Returns the plans of a method in `config.compare.searched`, in the order of their seeds.

  Args:
    config: Config of the run.
    text: Method, as in the name of its row.
    budget: Share of the dense model's MACs.

  Raises:
    UserError: If the method needs a search and has no plans there.
  """
  if parse(text, config)[0] in schedules():
    return []
  folder = pathlib.Path(paths.expand(config.compare.searched or ""))
  # Not `glob`, which takes a method's brackets for a pattern.
  start = file_name(f"{text}@{budget:g}-seed")
  there = folder.iterdir() if folder.is_dir() else []
  found = [path for path in there if path.name.startswith(start)]
  if not found:
    raise UserError(
      f"config.compare.searched: expected plans {start}*.json in {folder}, got none; leave it out "
      "to search."
    )
  return sorted(found, key=lambda path: (len(path.name), path.name))  # 2 comes before 10


def file_name(row: str) -> str:
  """Returns the name of a row's files, without slashes, which a plan's or data's path has."""
  return row.replace("/", ":")
