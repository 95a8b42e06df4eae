"""Explains in one line why a file of weights cannot be read."""

from pathlib import Path

from vitcomp_jax.errors import UserError


def damaged(path: Path, error: Exception) -> UserError:
  """Returns the error for a file that is damaged or not of the kind that its name suggests."""
  return UserError(
    f"weights {path} cannot be read ({line(error)}); the file is damaged or not of the kind "
    "its name says: fetch or write it again."
  )


def line(error: Exception) -> str:
  """Returns the first line of an error's message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
