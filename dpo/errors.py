"""Errors that users cause and can mend, and runs that were asked to stop."""


class UserError(Exception):
    """One line: the file, row, field or flag, what was expected, what was found. The CLI prints it and exits with 2."""

    def __str__(self) -> str:
        # names out of files may hold line breaks
        return " ".join(super().__str__().splitlines())


class PackingError(UserError, RuntimeError):
    """A model does not take the packed row's attention, which shows only when it runs: before anything is trained.

    In a library call it is the caller's mistake as often (a model that was not prepared), hence a RuntimeError too.
    """


class Stopped(Exception):
    """A run that was asked to stop and did. `status` is the exit status that shells expect: 128 + the signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
