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
_LISTED = 5  # number of names to list in a message


def sort_classes(names: Iterable[str], order: str = "sorted") -> tuple[str, ...]:
  """Sorts the names of class folders.

  Args:
    names: Names of the folders.
    order: `sorted` as in torchvision (1, 10, 2); or `natural` as in timm (1, 2, 10), which compares
      numbers by value and ignores case.

  Returns:
    The names in the order of their labels.
  """
  # Sort first, so that names that differ only by case have the same order on every machine.
  found = sorted(names)
  return tuple(sorted(found, key=_natural) if order == "natural" else found)


def _natural(name: str) -> list[str | int]:
  # Text and digits alternate, so that only values of the same type are compared.
  return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def are_numbers(names: Sequence[str]) -> bool:
  """Returns whether all names are plain numbers, which say no more than positions do."""
  return all(name.isdecimal() for name in names)


def read_names(path: str) -> tuple[str, ...]:
  """Reads the names of a model's outputs, in order.

  Args:
    path: A text file with one name per line; or `imagenet1k` for ImageNet-1k's WordNet ids.

  Raises:
    UserError: If the file cannot be read, or a name is empty or repeated.
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
    names: Names of the classes.
    outputs: Names of the model's outputs, in order.
    where: Name of the data, for the error message.

  Returns:
    The index of each class's output.

  Raises:
    UserError: If a class is not among the outputs.
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
  """Names a model's outputs by the classes of a data set.

  Args:
    names: Names of the data's classes, in order.
    num_classes: Number of outputs of the model.
    known: Names of the outputs in the weights, in order; empty if unknown.
    where: Name of the data, for messages.
    order: Order in which class folders were sorted, as `config.data.class_order`; None if not set.

  Returns:
    `known`, if it includes the data's classes. ImageNet-1k's WordNet ids, if the output names are
    unknown (or are ImageNet-1k's in words) and the data's classes are such ids for 1,000 outputs.
    Otherwise the data's own names, assumed to be in the order of the outputs, with a warning; if
    they are numbers, `known` has other names and `order` is None, they are sorted naturally.

  Raises:
    UserError: If neither the names nor their number fit.
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
    # The folders are numbered by their positions in the order of the weights' outputs.
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
  """Names the outputs of a classifier that is trained on a data set.

  Args:
    names: Names of the data's classes, in order.
    num_classes: Number of outputs of the model.
    known: Names of the outputs in the initial weights; empty if the weights have no names, or
      another number of outputs.
    where: Name of the data, for the error message.

  Returns:
    `known`, if it includes the data's classes, so that the classifier can be kept. ImageNet-1k's
    WordNet ids, if the data's classes are such ids for 1,000 outputs. Otherwise the data's names,
    padded with names `unused N`.

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
  """Raises a UserError unless there is one name for each output of the model."""
  if len(asked) != num_classes:
    raise UserError(
      f"config.data.classes: expected {num_classes} names, as many as the model has outputs, got "
      f"{len(asked)}."
    )


def differing(old: Sequence[str], new: Sequence[str]) -> str:
  """Describes the first difference between two lists of output names."""
  if len(old) != len(new):
    return f"{len(old)} classes, not {len(new)}"
  i = _first_difference(old, new)
  return f"another class {i}, {old[i]} and not {new[i]}"


def _first_difference(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns the index of the first difference between two sequences of equal length."""
  return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def _warn(names: Sequence[str], where: str, order: str | None) -> None:
  """Warns that the data's classes are assumed to be in the order of the model's outputs."""
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
