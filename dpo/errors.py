"""Errors that users cause and can mend, and runs that were asked to stop."""


class UserError(Exception):
    """One line: the file, row, field or flag, what was expected, what was found. The CLI prints it and exits with 2."""


class Stopped(Exception):
    """A run that was asked to stop and did. `status` is the exit status that shells expect: 128 + the signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
