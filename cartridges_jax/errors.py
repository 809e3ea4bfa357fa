"""The one exception type that the launch programs turn into a plain message."""


class UserError(Exception):
    """Bad input: a wrong path, value, file or combination that the user can put right.

    The launch programs print its single-line message to stderr and exit with code 2, without a
    traceback. The message names the offending value and says what to do instead.
    """
