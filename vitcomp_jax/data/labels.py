"""Maps the classes of a data set to the outputs of a model, by name or else by position."""

import collections
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

from vitcomp_jax import paths
from vitcomp_jax.data import class_names
from vitcomp_jax.errors import UserError

IMAGENET = "imagenet1k"
_LISTED = 5  # names in a message


def sort_classes(names: Iterable[str], order: str = "sorted") -> tuple[str, ...]:
  """Sorts the names of class folders.

  Args:
    names: Of the folders.
    order: `sorted`, as torchvision does (1, 10, 2), or `natural`, as timm does (1, 2, 10): numbers
      by their value, upper case as lower case.

  Returns:
    The names in the order of their labels.
  """
  # Names that are equal but for their case keep one order on every machine.
  found = sorted(names)
  return tuple(sorted(found, key=_natural) if order == "natural" else found)


def _natural(name: str) -> list[str | int]:
  # Text and digits alternate, so that only like is compared with like.
  return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def are_numbers(names: Sequence[str]) -> bool:
  """Returns whether all names are plain numbers, which say no more than positions."""
  return all(name.isdecimal() for name in names)


def read_names(path: str) -> tuple[str, ...]:
  """Reads names of a model's outputs: a line each, the first output's first.

  Args:
    path: A text file; or `imagenet1k`, the WordNet ids of ImageNet-1k.

  Raises:
    UserError: If there is no such file, or a name is empty or there twice.
  """
  if path == IMAGENET:
    return class_names.imagenet_ids()
  try:
    text = pathlib.Path(paths.expand(path)).read_text(encoding="utf-8-sig")
  except (OSError, ValueError) as error:
    raise UserError(
      f"config.data.classes: expected {IMAGENET}, or a text file with a name per line, got "
      f"{path!r} ({error})."
    ) from error
  names = [line.strip() for line in text.rstrip().splitlines()]
  faults = [f"{name!r} {n} times" for name, n in collections.Counter(names).items() if n > 1]
  faults += ["an empty line"] if "" in names else []
  if faults or not names:
    got = ", ".join(faults[:_LISTED]) or "none"
    raise UserError(
      f"config.data.classes: expected a name per line, each once, in {path}, got {got}."
    )
  return tuple(names)


def match(names: Sequence[str], outputs: Sequence[str], where: str) -> tuple[int, ...]:
  """Finds each class among the names of a model's outputs.

  Args:
    names: Of the classes.
    outputs: Of the model's outputs, in order.
    where: Names the data, for the error.

  Returns:
    The output of each class.

  Raises:
    UserError: If some are not there.
  """
  index = {name: i for i, name in enumerate(outputs)}
  unknown = [name for name in names if name not in index]
  if unknown:
    raise UserError(
      f"{where}: expected classes among the model's {len(outputs)} ({_some(outputs)}), got "
      f"{len(unknown)} others ({_some(unknown)}); rename the folders, name the model's outputs in "
      "config.data.classes, or train a head by the stage pretrain."
    )
  return tuple(index[name] for name in names)


def name_outputs(
  names: Sequence[str],
  num_classes: int,
  known: Sequence[str],
  where: str,
  order: str | None = None,
) -> tuple[str, ...]:
  """Names a model's outputs as the data do.

  Args:
    names: Of the data's classes, in their order.
    num_classes: Outputs of the model.
    known: Names of the outputs, in order, as the weights have them; empty: they have none.
    where: Names the data, for messages.
    order: In which class folders were sorted, as `config.data.class_order`; None: not said.

  Returns:
    `known`, if the data know their classes by these names; ImageNet's, if theirs are WordNet ids
    and the model has 1,000 outputs. Otherwise the data's own names, whose places then are taken on
    trust, a warning says so: of numbers, where `known` has other names and no order is asked for,
    in their natural order.

  Raises:
    UserError: If neither names nor their number fit.
  """
  if set(names) <= set(known):
    return tuple(known)
  imagenet = class_names.imagenet_ids()
  is_imagenet = not known or tuple(known) == class_names.readable(imagenet)
  if num_classes == len(imagenet) and set(names) <= set(imagenet) and is_imagenet:
    return imagenet
  if known and not (are_numbers(names) and not are_numbers(known)):
    match(names, known, where)
  if known and order is None:
    # The weights' order is another than that of the folders' names: a number is a place in it.
    names = sort_classes(names, "natural")
  if len(names) != num_classes:
    raise UserError(
      f"{where}: expected {num_classes} classes, one for each output of the model, or names that "
      f"it has, got {len(names)} ({_some(names)}); name the outputs in config.data.classes (a file "
      f"with a name per line, or {IMAGENET}), or train a head by the stage pretrain."
    )
  _warn(names, where, order)
  return tuple(names)


def name_trained_outputs(
  names: Sequence[str], num_classes: int, known: Sequence[str], where: str
) -> tuple[str, ...]:
  """Names the outputs of a classifier that is trained on the data.

  Args:
    names: Of the data's classes, in their order.
    num_classes: Outputs of the model.
    known: Names of the outputs in the weights to start from; empty: they have none, or another
      number of outputs.
    where: Names the data, for the error.

  Returns:
    `known`, if the data's classes are among them: their order stays, and so does their classifier.
    ImageNet's, for WordNet ids and 1,000 outputs. Otherwise the data's names; outputs beyond them
    are called unused.

  Raises:
    UserError: If there are more classes than outputs.
  """
  if set(names) <= set(known):
    return tuple(known)
  imagenet = class_names.imagenet_ids()
  if num_classes == len(imagenet) and set(names) <= set(imagenet):
    return imagenet
  if len(names) > num_classes:
    raise UserError(
      f"config.model.num_classes: expected at least the {len(names)} of {where}, got {num_classes}."
    )
  return (*names, *(f"unused {i}" for i in range(len(names), num_classes)))


def check_count(asked: Sequence[str], num_classes: int) -> None:
  """Refuses names of another number of outputs than the model has."""
  if len(asked) != num_classes:
    raise UserError(
      f"config.data.classes: expected {num_classes} names, as many as the model has outputs, got "
      f"{len(asked)}."
    )


def differing(old: Sequence[str], new: Sequence[str]) -> str:
  """Describes in what names of outputs differ."""
  if len(old) != len(new):
    return f"{len(old)} classes, not {len(new)}"
  i = _first_difference(old, new)
  return f"another class {i}, {old[i]} and not {new[i]}"


def _first_difference(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns where two equally long sequences that differ do so first."""
  return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def _warn(names: Sequence[str], where: str, order: str | None) -> None:
  """Says what is taken on trust."""
  shown = ", ".join(f"{name} is {i}" for i, name in enumerate(names[:_LISTED]))
  logging.warning(
    "%s: classes are numbered by their order (%s%s), which could not be compared with the model's; "
    "name its outputs in config.data.classes to be sure",
    where,
    shown,
    ", …" if len(names) > _LISTED else "",
  )
  natural = sort_classes(names, "natural")
  if order is None and natural != tuple(names):
    i = _first_difference(names, natural)
    logging.warning(
      "%s: class %d is %s in sorted order (torchvision's, which is taken), and %s in natural order "
      "(timm's); set config.data.class_order to the one that the model was trained with",
      where,
      i,
      names[i],
      natural[i],
    )


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
