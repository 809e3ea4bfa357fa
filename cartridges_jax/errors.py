"""What users read when something is wrong: `UserError`, and other libraries' exceptions in one line."""


class UserError(Exception):
    """Bad input: a wrong path, value, file or combination that the user can put right.

    The launch programs print its single-line message to stderr and exit with code 2, without a
    traceback. The message names the offending value and says what to do instead.
    """


def one_line(error: Exception) -> str:
    """Another library's exception for a message of ours: its text in one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
