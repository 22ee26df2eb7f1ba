"""Points in time on a GPU."""

from __future__ import annotations

import torch


def mark(device: torch.device) -> torch.cuda.Event:
    """A point in time of what was queued on `device`, which need not be the current one.

    An event that is not told a stream lies on the current device's, and knows nothing of another's work.
    """
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
