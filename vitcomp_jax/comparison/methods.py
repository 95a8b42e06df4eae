"""Reads how a config names the methods of a comparison: `NAME` or `NAME[KEY=VALUE,...]`."""

import pathlib
import re

from vitcomp_jax import paths
from vitcomp_jax.config import Config, from_config_dict, to_dict, with_overrides
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.registry import schedules, untrained_schedules
from vitcomp_jax.models.spec import ViTSpec

SEARCHED = "diffrate"  # the method whose plans are searched, the reference of all others
SLIMMED = "vit_slim"  # the method that trains the weights with its masks
_METHOD = re.compile(r"(\w+)(?:\[([^\[\]]+)\])?")


def parse(text: str, config: Config) -> tuple[str, Config]:
  """Returns a method's name, and the config that is its own.

  Args:
    text: Such as `diffrate[actions=merge]`: keys of `search`, or, with a dot, any other.
    config: Of the run, in which these keys are changed.

  Raises:
    UserError: If the text is something else, or a key does not exist.
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
  """Refuses methods that do not exist, or must be trained where they are compared untrained."""
  for text in config.compare.methods:
    name = _known("methods", text, config, spec, (SEARCHED,))
    if name not in (SEARCHED, *untrained_schedules()):
      raise UserError(f"config.compare.methods: {name} has to be trained; name it in `finetuned`.")
  for text in config.compare.finetuned:
    _known("finetuned", text, config, spec, (SEARCHED, SLIMMED))


def _known(key: str, text: str, config: Config, spec: ViTSpec, learning: tuple[str, ...]) -> str:
  name, own = parse(text, config)
  spec.importance(own.search.importance)  # raises
  if name not in {*schedules(), *learning}:
    known = ", ".join((*learning, *schedules()))
    raise UserError(f"config.compare.{key}: expected some of {known}, got {text}.")
  return name


def searched_before(config: Config, text: str, budget: float) -> list[pathlib.Path]:
  """Returns the plans of a method in `config.compare.searched`, from an earlier comparison.

  Args:
    config: Of the run.
    text: The method, as its rows are named.
    budget: A share of the dense model's MACs.

  Raises:
    UserError: If it searches, and there are none.
  """
  if parse(text, config)[0] in schedules():
    return []
  folder = pathlib.Path(paths.expand(config.compare.searched or ""))
  # Not `glob`, to which the brackets of a method mean something.
  start = f"{text}@{budget:g}-seed"
  there = sorted(folder.iterdir()) if folder.is_dir() else []
  found = [path for path in there if path.name.startswith(start)]
  if not found:
    raise UserError(
      f"config.compare.searched: expected plans {start}*.json in {folder}, got none; leave it out "
      "to search."
    )
  return found
