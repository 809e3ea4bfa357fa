"""Errors for users: `UserError`, and other libraries' exceptions in one line."""

import signal


class UserError(Exception):
    """Bad input: a wrong path, value, file or combination that the user can put right.

    The launch programs print its single-line message to stderr and exit with its code, 2, without a
    traceback. The message names the offending value and says what to do instead.
    """

    exit_code = 2


class PassingFailure(UserError):
    """A failure that is likely gone when the same command is started again, which resumes (EX_TEMPFAIL)."""

    exit_code = 75


class JobEnded(PassingFailure):
    """Another process of the job ended with an error, was lost, or stalls: this one cannot continue alone."""

    def __init__(self, message: str, exit_code: int = PassingFailure.exit_code):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):
    """A request to stop the run; a BaseException, so that no handler of errors swallows it."""

    def __init__(self, signum: int):
        self.exit_code = 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


def one_line(error: BaseException) -> str:
    """Another library's exception for a message of ours: its text in one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
