"""Every case of bad input, in the order of dpo/ERRORS.md."""

# importing a module adds its cases
from tests.errors import input_cases, model_cases, run_cases  # noqa: F401
from tests.errors.case import CASES, Case

__all__ = ["CASES", "Case"]
