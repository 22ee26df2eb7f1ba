"""`shi-labs/natten` for the `kernels` library, made of this package: code that asks for that kernel gets ours."""

from __future__ import annotations

import json
from pathlib import Path

from vicinal._files import write_whole
from vicinal.errors import InvalidProblem

REPOSITORY = "shi-labs/natten"

MODULE = '''"""NATTEN's functions as vicinal has them, on every device that PyTorch has."""

from vicinal.integrations.natten.functional import merge_attentions, na1d, na2d, na3d

__all__ = ["merge_attentions", "na1d", "na2d", "na3d"]
'''

METADATA = {
    "id": "vicinal_natten",
    "name": "natten",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cpu"},
}


def write_natten_kernel(folder: str | Path) -> str:
    """Write the folder that `LOCAL_KERNELS` names, so that unmodified code runs our `na1d`, `na2d` and `na3d`.

    diffusers' `LTX2VideoVaeNeighborhoodNattenProcessor` and others load NATTEN's binary by
    `kernels.get_kernel("shi-labs/natten")`. With the environment variable that this returns, the same call
    loads the written module, which needs this package, no compiler and no network, on CPUs and GPUs alike.

    Args:
        folder: to be made, or empty, or written by this function before.

    Returns:
        `LOCAL_KERNELS=shi-labs/natten=<folder>`, to be put into the environment.

    Raises:
        InvalidProblem: if the folder holds something else, or cannot be named in that variable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_natten_kernel(folder).startswith("LOCAL_KERNELS=shi-labs/natten=/")
        True
    """
    folder = Path(folder).resolve()
    if ":" in str(folder):
        raise InvalidProblem(f"DIR must hold no colon, with which LOCAL_KERNELS separates its entries, got {folder}")
    # Pure Python for any build of torch is what `kernels` calls universal.
    variant = folder / "build" / "torch-universal"
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not variant.is_dir())):
        raise InvalidProblem(f"DIR must be a new or empty folder, got {folder}, which holds something else")
    variant.mkdir(parents=True, exist_ok=True)
    for name, text in (("__init__.py", MODULE), ("metadata.json", json.dumps(METADATA, indent=2) + "\n")):
        write_whole(variant / name, lambda file, text=text: file.write(text.encode()))
    return f"LOCAL_KERNELS={REPOSITORY}={folder}"
