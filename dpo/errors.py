"""Errors that users cause and can mend."""


class UserError(Exception):
    """One line that names the file, row, field or flag, what was expected and what was found. The CLI prints it and exits with 2."""
