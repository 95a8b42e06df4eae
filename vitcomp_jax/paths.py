"""Expands paths as a user writes them."""

import os
import re

from vitcomp_jax.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str | os.PathLike[str]) -> str:
  """Expands a path as a shell does, which passes some on as they are, such as `--workdir=~/run`.

  Args:
    path: In which `~` and `~USER` at its beginning stand for a home, and `$NAME` and `${NAME}` for
      variables of the environment, unless there is a file of that very name.

  Raises:
    UserError: If there is neither such a variable nor such a file.
  """
  path = os.path.expanduser(path)

  def value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
      raise UserError(
        f"{path}: expected the environment variable {name} to be set, or a file of that very name, "
        "got neither; set it, or write out the path."
      )
    return os.environ[name]

  return path if os.path.lexists(path) else _VARIABLE.sub(value, path)
