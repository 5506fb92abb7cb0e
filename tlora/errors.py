"""The error that a user can act on."""


class UserError(ValueError):
    """Bad input. The message is one line: file, key, value and what was expected.

    The command line prints it without a traceback and exits with status 1.
    """
