"""The two ways a call can fail: it asks for something meaningless, or for something not offered."""


class InvalidProblem(ValueError):
    """The arguments do not describe a neighborhood attention problem.

    The message names the argument, says what was expected and what came.
    """


class Unsupported(NotImplementedError):
    """The problem is meaningful, but what was asked to solve it cannot.

    The message says which backend (or all of them) declined, and why.
    """
