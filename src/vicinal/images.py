"""Pictures and volumes in files: PNG, JPEG, TIFF, stacks of them, NumPy and NIfTI. Written whole or not at all."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vicinal._files import scratch_beside, write_whole
from vicinal.errors import InvalidProblem, Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Suffixes that Pillow reads and writes; `.tif` and `.tiff` may hold stacks."""

VOLUMES = (".npy", ".nii", ".nii.gz")

_GRAY = {"1": "L", "L": "L", "LA": "L", "I;16": "I;16", "I;16B": "I;16", "I;16L": "I;16", "I": "I", "F": "F"}
"""Pillow's one-channel modes, and what we read them as; every other mode is read as RGB."""


@dataclass(frozen=True)
class Image:
    """A picture or a volume, and what must survive from one file to the next.

    Args:
        pixels: `[*S]`, or `[*S, C]` if it has channels; two axes for a picture, three for a stack or volume.
        has_channels: whether the last axis is colour.
        alpha: transparency of the same grid, if there was any; it is carried along, never computed with.
        extras: what the format keeps beside pixels: colour profile, resolution, affine map.
    """

    pixels: NDArray[Any]
    has_channels: bool = False
    alpha: NDArray[Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def pages(self) -> int:
        """Pictures of the stack; 1 for a single one."""
        return self.pixels.shape[0] if self.pixels.ndim == 3 + self.has_channels else 1

    @property
    def channel_axis(self) -> int | None:
        return -1 if self.has_channels else None

    def __str__(self) -> str:
        shape = self.pixels.shape[:-1] if self.has_channels else self.pixels.shape
        kind = f", {self.pixels.shape[-1]} channels" if self.has_channels else ""
        return f"{'x'.join(map(str, shape))}{kind}, {self.pixels.dtype}"

    def with_pixels(self, pixels: NDArray[Any]) -> Image:
        """The same file with other pixels, converted to its element type.

        Where that is an integer type, `pixels` are fractions of its largest number, as `vicinal.denoise` returns
        them; they are rounded and clipped.

        Example:
            >>> import numpy as np
            >>> Image(np.zeros((2, 3), np.uint8)).with_pixels(np.full((2, 3), 0.5, np.float32)).pixels.max()
            np.uint8(128)
        """
        import numpy as np

        kind = self.pixels.dtype
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            scaled = np.rint(pixels.astype(np.float64) * limits.max)
            pixels = np.clip(scaled, limits.min, limits.max)
        return replace(self, pixels=pixels.astype(kind))


def read_image(path: str | Path, *, memory_bytes: int | None = None) -> Image:
    """Read a picture, a stack of pictures, or a volume.

    Files of several pages become one more axis in front; palettes and colour models other than gray become RGB;
    a camera's orientation is applied.

    Args:
        path: a file whose name ends in one of `PICTURES` or `VOLUMES`. NIfTI needs the package `nibabel`.
        memory_bytes: refuse what would take more, decoded as float32. `None`: what the system has available.

    Raises:
        InvalidProblem: if the file is missing, empty, not what its name says, damaged, or too large.
        Unsupported: if a package that reads this format is not installed.
    """
    path = Path(path)
    suffix = _suffix(path, "input")
    if path.is_dir():
        raise InvalidProblem(f"input must be a file, got the folder {str(path)!r}")
    if not path.exists():
        raise InvalidProblem(f"input must exist, got {str(path)!r}, which does not; check the path")
    if not path.stat().st_size:
        raise InvalidProblem(f"input must hold a picture, got the empty file {str(path)!r}")
    limit = _available_bytes() if memory_bytes is None else memory_bytes
    readers = {".npy": _read_numpy, ".nii": _read_nifti, ".nii.gz": _read_nifti}
    try:
        image = readers.get(suffix, _read_picture)(path, limit)
    except PermissionError:
        raise InvalidProblem(f"input must be readable, got {str(path)!r}; check its permissions") from None
    if not image.pixels.size:
        raise InvalidProblem(f"input must hold at least one pixel, got {image} in {str(path)!r}")
    return image


def write_image(path: str | Path, image: Image) -> None:
    """Write a picture, a stack of pictures (TIFF), or a volume, whole or not at all.

    Raises:
        InvalidProblem: if the folder is missing or closed to us, or the format cannot hold such pixels.
        Unsupported: if a package that writes this format is not installed.
    """
    path = Path(path)
    check_output(path, image)
    suffix, pixels = _suffix(path, "output"), image.pixels
    if suffix in (".nii", ".nii.gz"):
        _write_nifti(path, image)
    elif suffix == ".npy":
        import numpy as np

        def save(file: BinaryIO) -> None:
            np.save(file, pixels)

        write_whole(path, save)
    else:
        _write_picture(path, suffix, image)


def check_output(path: str | Path, image: Image | None = None) -> None:
    """Refuse a path that cannot be written, before anything expensive is computed.

    Raises:
        InvalidProblem: if its suffix is unknown, it is a folder, its folder is missing or closed to us, or the format
            cannot hold such an image.
        Unsupported: if a package that writes this format is not installed.
    """
    path = Path(path)
    suffix = _suffix(path, "output")
    if path.is_dir():
        raise InvalidProblem(f"output must be a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise InvalidProblem(f"output must lie in a folder that exists, got {str(path)!r}; make {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidProblem(f"output must lie in a folder that we may write to, got {str(path)!r}")
    if suffix in (".nii", ".nii.gz"):
        _nibabel()
    if image is not None:
        _check_holds(path.name, suffix, image)


def _check_holds(name: str, suffix: str, image: Image) -> None:
    kind, is_tiff = str(image.pixels.dtype), suffix in (".tif", ".tiff")
    if suffix == ".npy":
        return
    if suffix in (".nii", ".nii.gz"):
        if image.has_channels:
            raise InvalidProblem(f"output must be .npy or a picture to hold colours, got {name!r}")
        return
    if image.pages > 1 and not is_tiff:
        raise InvalidProblem(f"output must end in .tif, .npy or .nii to hold a stack of {image.pages}, got {name!r}")
    if image.has_channels and kind != "uint8":
        raise InvalidProblem(f"output must end in .npy to hold colours of {kind}, got {name!r}")
    holds = (
        {"uint8"} | ({"uint16"} if suffix == ".png" else set()) | ({"uint16", "int32", "float32"} if is_tiff else set())
    )
    if kind not in holds:
        raise InvalidProblem(f"output must end in {'.npy' if is_tiff else '.tif or .npy'} to hold {kind}, got {name!r}")


def _suffix(path: Path, which: str) -> str:
    name = path.name.lower()
    for suffix in sorted(PICTURES + VOLUMES, key=len, reverse=True):
        if name.endswith(suffix):
            return suffix
    known = ", ".join(PICTURES + VOLUMES)
    raise InvalidProblem(f"{which} must end in one of {known}, got {str(path)!r}")


def _available_bytes() -> int:
    """Memory that may be taken without swapping, as far as the system tells; else half of all."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 2**62


def _refuse_if_large(path: Path, values: int, limit: int) -> None:
    # The picture itself, in float32, once as input and once as output, beside the file's own decoded pixels.
    needed = 4 * 3 * values
    if needed > limit:
        raise InvalidProblem(
            f"input is too large for memory: {str(path)!r} holds {values:,} values, which take "
            f"{needed / 2**30:.1f} GiB, and {limit / 2**30:.1f} GiB are available; crop it or use a larger machine"
        )


def _pillow() -> Any:
    try:
        for module in ("Image", "ImageOps", "ImageSequence"):
            import_module(f"PIL.{module}")
    except ModuleNotFoundError:
        raise Unsupported("pictures need the package pillow; install it with: pip install pillow") from None
    return import_module("PIL")


def _read_picture(path: Path, limit: int) -> Image:
    pillow = _pillow()
    # Pillow guards against bombs by its own limit on pixels, and warns below it; ours is the memory there is.
    try:
        with warnings.catch_warnings(action="ignore", category=pillow.Image.DecompressionBombWarning):
            file = pillow.Image.open(path)
        with file:
            frames = getattr(file, "n_frames", 1)
            _refuse_if_large(path, frames * file.width * file.height * (1 if file.mode in _GRAY else 3), limit)
            extras = {key: file.info[key] for key in ("icc_profile", "dpi") if key in file.info}
            pages = [_page(pillow, page) for page in pillow.ImageSequence.Iterator(file)]
    except pillow.UnidentifiedImageError:
        raise InvalidProblem(f"input must be a picture, got {str(path)!r}, which no reader recognizes") from None
    except pillow.Image.DecompressionBombError as error:
        raise InvalidProblem(f"input is too large: {str(path)!r}: {error}") from None
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidProblem(f"input must be a whole picture, got {str(path)!r}, which is damaged: {error}") from None
    import numpy as np

    shapes = {(pixels.shape, str(pixels.dtype)) for pixels, _ in pages}
    if len(shapes) > 1:
        raise InvalidProblem(f"input must hold pages of one size and kind, got {len(shapes)} kinds in {str(path)!r}")
    has_channels = pages[0][0].ndim == 3
    if len(pages) == 1:
        return Image(pages[0][0], has_channels, pages[0][1], extras)
    return Image(np.stack([pixels for pixels, _ in pages]), has_channels, None, extras)


def _page(pillow: Any, page: Any) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Pixels and transparency of one page."""
    import numpy as np

    page = pillow.ImageOps.exif_transpose(page)
    alpha = None
    if page.mode in ("RGBA", "LA", "PA") or "transparency" in page.info:
        alpha = np.asarray(page.convert("RGBA").getchannel("A"))
    mode = _GRAY.get(page.mode, "RGB")
    return np.asarray(page if page.mode == mode else page.convert(mode)), alpha


def _write_picture(path: Path, suffix: str, image: Image) -> None:
    import numpy as np

    pillow = _pillow()
    pixels = image.pixels
    pages = pixels if image.pages > 1 else pixels.reshape(pixels.shape[-2 - image.has_channels :])[None]
    files = [pillow.Image.fromarray(np.ascontiguousarray(page)) for page in pages]
    if image.alpha is not None and suffix in (".png", ".webp", ".tif", ".tiff") and pixels.dtype == np.uint8:
        files[0].putalpha(pillow.Image.fromarray(image.alpha))
    options: dict[str, Any] = dict(image.extras)
    if suffix in (".jpg", ".jpeg"):
        options |= {"quality": 95}
    if len(files) > 1:
        options |= {"save_all": True, "append_images": files[1:]}
    kind = pillow.Image.registered_extensions()[suffix]
    write_whole(path, lambda file: files[0].save(file, format=kind, **options))


def _read_numpy(path: Path, limit: int) -> Image:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InvalidProblem(f"input must be a NumPy array, got {str(path)!r}: {error}") from None
    _refuse_if_large(path, array.size, limit)
    if array.dtype.kind not in "iuf":
        raise InvalidProblem(f"input must hold real numbers, got {array.dtype} in {str(path)!r}")
    # Nobody has a volume that is 3 or 4 pixels thin along its last axis and no colour picture.
    has_channels = array.ndim in (3, 4) and array.shape[-1] == 3
    if not 2 <= array.ndim - has_channels <= 3:
        raise InvalidProblem(f"input must have 2 or 3 axes beside colours, got shape {array.shape} in {str(path)!r}")
    return Image(np.array(array), has_channels)


def _nibabel() -> Any:
    try:
        return import_module("nibabel")
    except ModuleNotFoundError:
        raise Unsupported(
            "NIfTI files need the package nibabel; install it with: pip install nibabel, or convert to .npy"
        ) from None


def _read_nifti(path: Path, limit: int) -> Image:
    nibabel = _nibabel()
    import numpy as np

    try:
        file = nibabel.load(path)
        _refuse_if_large(path, int(np.prod(file.shape)), limit)
        pixels = file.get_fdata(dtype=np.float32)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        if isinstance(error, InvalidProblem):
            raise
        raise InvalidProblem(f"input must be a NIfTI volume, got {str(path)!r}: {error}") from None
    pixels = pixels[..., 0] if pixels.ndim == 4 and pixels.shape[-1] == 1 else pixels
    if pixels.ndim not in (2, 3):
        raise InvalidProblem(f"input must be one volume of 3 axes, got shape {pixels.shape} in {str(path)!r}")
    return Image(pixels, extras={"affine": file.affine})


def _write_nifti(path: Path, image: Image) -> None:
    nibabel = _nibabel()
    import numpy as np

    volume = nibabel.Nifti1Image(image.pixels.astype(np.float32), image.extras.get("affine", np.eye(4)))
    with scratch_beside(path, ".nii.gz" if path.name.lower().endswith(".gz") else ".nii") as scratch:
        nibabel.save(volume, scratch)
