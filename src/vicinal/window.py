"""The definition of neighborhood attention along one axis. Everything else is tested against it."""

from vicinal._tuples import ceil_div


def window(
    query: int, length: int, kernel_size: int, *, stride: int = 1, dilation: int = 1, is_causal: bool = False
) -> range:
    """Positions along an axis of `length` tokens that the token at `query` attends to.

    Dilation splits the axis into `dilation` interleaved groups which never mix. Inside a group,
    queries are taken `stride` at a time, and all of them share the window of one leader: the
    middle query (right of the centre in a tie), or the last one if the axis is causal.

    A window holds `kernel_size` keys around its leader, one more to the left where that number is
    even. At the borders it is pushed inside: it shifts, it never shrinks. A causal window ends at
    the query itself and may hold fewer keys.

    Every window holds its query, and at most `kernel_size` keys in a row: keys lie within
    `kernel_size - 1` members of the query, also at the borders and with a stride. So a table of
    `2 * kernel_size - 1` entries has one for every offset that occurs.

    Args:
        query: token index in `[0, length)`.
        length: tokens on the axis, at least `kernel_size * dilation`.
        kernel_size: keys per window, counting the query itself.
        stride: queries that share one window, in `[1, kernel_size]`.
        dilation: distance between neighboring keys, in tokens.
        is_causal: whether a query may only see itself and what comes before.

    Returns:
        The keys, as a `range` whose step is `dilation`.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922, section 3.

    Example:
        >>> list(window(0, 8, 3)), list(window(4, 8, 3))
        ([0, 1, 2], [3, 4, 5])
        >>> [list(window(q, 8, 4, stride=2)) for q in (2, 3)]
        [[1, 2, 3, 4], [1, 2, 3, 4]]
    """
    group, member = query % dilation, query // dilation
    members = ceil_div(length - group, dilation)
    leader = member - member % stride + (stride - 1 if is_causal else stride // 2)
    leader = min(leader, members - 1)
    if is_causal:
        first, last = max(leader - kernel_size + 1, 0), member
    else:
        first = min(max(leader - kernel_size // 2, 0), members - kernel_size)
        last = first + kernel_size - 1
    return range(group + first * dilation, group + last * dilation + 1, dilation)


def viewers(
    key: int, length: int, kernel_size: int, *, stride: int = 1, dilation: int = 1, is_causal: bool = False
) -> range:
    """Positions along an axis whose windows hold the token at `key`: `window`, read the other way.

    Both ends of a window move monotonically with its query, so the queries that see a key are a run
    inside its dilation group. They begin with the first whose window has not ended before the key
    and end with the stride group whose window is the last to begin by then.

    Args:
        key: token index in `[0, length)`.
        length, kernel_size, stride, dilation, is_causal: as for `window`.

    Returns:
        The queries, as a `range` whose step is `dilation`.

    Example:
        >>> list(viewers(0, 8, 3)), list(viewers(4, 8, 3))
        ([0, 1], [3, 4, 5])
    """
    group, member = key % dilation, key // dilation
    members = ceil_div(length - group, dilation)

    def begun_by(place: int) -> int:
        """How many queries have windows that begin at `place` or before; those are the first ones."""
        if place >= members - kernel_size:
            return members
        reach, lead = (kernel_size - 1, stride - 1) if is_causal else (kernel_size // 2, stride // 2)
        return min(((place + reach - lead) // stride + 1) * stride, members)

    stop = begun_by(member)
    start = 0 if member < kernel_size else begun_by(member - kernel_size)
    if is_causal:
        start = member
    return range(group + start * dilation, group + (stop - 1) * dilation + 1, dilation)
