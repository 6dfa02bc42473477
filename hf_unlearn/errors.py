"""The one exception of this package."""


class UnlearningError(ValueError):
    """
    Input that cannot be used.

    The message names the option, row or file, says why it cannot be used, and how to go on. The command line prints
    it without a traceback and exits with code 2.
    """
