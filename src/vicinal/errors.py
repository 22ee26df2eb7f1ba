"""The two ways a call can fail: it asks for something meaningless, or for something not offered."""


class InvalidProblem(ValueError):
    """The arguments do not describe a neighborhood attention problem.

    The message names the argument, says what was expected and what came.

    Example:
        >>> from vicinal import Problem
        >>> Problem.grid((8, 12), kernel_size=9)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        vicinal.errors.InvalidProblem: axis 0 of 8x12: the window does not fit: kernel_size * dilation = 9 * 1 = 9 > ...
    """


class Unsupported(NotImplementedError):
    """The problem is meaningful, but what was asked to solve it cannot.

    The message says which backend (or all of them) declined, and why.

    Example:
        >>> import torch
        >>> from vicinal import neighborhood_attention
        >>> neighborhood_attention(*torch.zeros(3, 1, 8, 12, 1, 16), 3, backend="hopper")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        vicinal.errors.Unsupported: backend 'hopper' declines this problem (8x12 grid, window 3x3) on cpu:
        hopper     no   needs sm_90...
    """
