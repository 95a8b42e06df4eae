"""The one exception a user's mistake raises."""


class UserError(Exception):
  """A mistake in what the user gave: shown as one line, exit status 2.

  The message says what was expected, what was got and what to do about it.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.get_spec("deit_smal_patch16_224")
    Traceback (most recent call last):
    vitcomp_jax.errors.UserError: variant 'deit_smal_patch16_224' is not known; near it are ...
  """
