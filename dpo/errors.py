"""Errors that users cause and can mend."""


class UserError(Exception):
    """One line: the file, row, field or flag, what was expected, what was found. The CLI prints it and exits with 2."""
