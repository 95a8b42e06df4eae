"""In which order names of classes become labels."""

import re
from collections.abc import Iterable

from vitcomp_jax.errors import UserError

CLASS_ORDERS = ("sorted", "natural")


def sort_classes(names: Iterable[str], order: str) -> tuple[str, ...]:
  """Sorts the names of class folders.

  Args:
    names: Of the folders.
    order: `sorted`, as torchvision does (1, 10, 2), or `natural`, as timm does (1, 2, 10): numbers
      by their value, upper case as lower case.

  Returns:
    The names in the order of their labels.

  Raises:
    UserError: If there is no such order.
  """
  if order not in CLASS_ORDERS:
    raise UserError(f"config.data.class_order: expected one of {CLASS_ORDERS}, got {order!r}.")
  found = sorted(names)
  return tuple(sorted(found, key=_natural) if order == "natural" else found)


def _natural(name: str) -> list[str | int]:
  # Text and digits alternate, so that only like is compared with like.
  return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]
