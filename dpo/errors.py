"""Errors that users cause and can mend."""


class UserError(Exception):
    """One line: the file, row, field or flag, what was expected, what was found. The CLI prints it and exits with 2."""


class PackingError(UserError, RuntimeError):
    """A model does not take the packed row's attention, which shows only when it runs: before anything is trained.

    In a library call it is the caller's mistake as often (a model that was not prepared), hence a RuntimeError too.
    """
