"""The exception that is raised for a user's mistake."""


class UserError(Exception):
  """A mistake in the user's input, shown as one line with exit status 2.

  The message says what was expected, what was given instead and what to do about it.

  Examples:
    >>> import vitcomp_jax as vc
    >>> vc.get_spec("deit_smal_patch16_224")
    Traceback (most recent call last):
    vitcomp_jax.errors.UserError: variant 'deit_smal_patch16_224' is not known; near it are ...
  """
