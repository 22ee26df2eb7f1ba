"""What to test a backend with: laws, random problems, tolerances and, in `strategies`, what hypothesis draws from."""

from vicinal.testing.checks import LAWS, Finding, Law, Report, check_backend
from vicinal.testing.fuzzing import fuzz
from vicinal.testing.tolerance import assert_as_good_as_eager

__all__ = ["LAWS", "Finding", "Law", "Report", "assert_as_good_as_eager", "check_backend", "fuzz"]
