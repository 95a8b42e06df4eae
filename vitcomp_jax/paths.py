"""Expands paths that users write."""

import os
import re

from vitcomp_jax.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str | os.PathLike[str]) -> str:
  """Expands a path as a shell does, since shells do not expand arguments like `--workdir=~/run`.

  Args:
    path: A path. A leading `~` or `~USER` is replaced by a home directory; `$NAME` and `${NAME}`
      are replaced by environment variables, unless a file of that literal name exists.

  Raises:
    UserError: If an environment variable is not set, and there is no file of the literal name.
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
