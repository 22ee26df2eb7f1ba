"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file; it appears under its name when it is complete, or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "a.txt", lambda file: file.write(b"all of it"))
        ...     (Path(folder) / "a.txt").read_text()
        'all of it'
    """
    with scratch_beside(Path(path), Path(path).suffix) as scratch, open(scratch, "w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def scratch_beside(path: Path, suffix: str) -> Generator[Path]:
    """A file beside `path` that takes its place at the end, and is gone if that does not come."""
    # The same folder, since replacing is atomic within one file system only.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, _mode(path))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """Permissions of the file to be replaced, or those of any new file: scratch files are private."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
