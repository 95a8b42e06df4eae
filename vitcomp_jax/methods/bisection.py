"""Bisection, used by every method to meet its budget."""

from collections.abc import Callable

_STEPS = 50


def bracket(is_above: Callable[[float], bool], below: float, above: float) -> tuple[float, float]:
  """Finds where a cost crosses a budget.

  Args:
    is_above: Returns whether a value costs more than the budget; monotone between the ends.
    below: End that costs less; may be the smaller or the larger number.
    above: End that costs more.

  Returns:
    Two neighbouring values, the first on the side of `below`, the second on that of `above`. If the
    whole range is above the budget, both are next to `below`; if it is below, both are next to
    `above`.
  """
  for _ in range(_STEPS):
    middle = (below + above) / 2
    below, above = (below, middle) if is_above(middle) else (middle, above)
  return below, above
