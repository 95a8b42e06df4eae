"""The one exception a user's mistake raises."""


class UserError(Exception):
  """A mistake in what the user gave: shown as one line, exit status 2.

  The message says what was expected, what was got and what to do about it.
  """
