"""What can be known of Triton without importing it."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.util import find_spec


@lru_cache(maxsize=1)
def is_installed() -> bool:
    return find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether Triton interprets kernels: it looks at `TRITON_INTERPRET` once, when they are first imported."""
    compile = sys.modules.get("vicinal.backends.triton.compile")
    if compile is not None:
        return compile.IS_INTERPRETED
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
