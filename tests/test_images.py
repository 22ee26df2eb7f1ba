"""Pictures and volumes survive their files; what cannot be read or held is refused; files are whole or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from vicinal._files import write_whole
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.images import Image, check_output, read_image, write_image

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (7, 11), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (7, 11, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (7, 11), dtype=np.uint16)
REAL = RNG.standard_normal((7, 11)).astype(np.float32)
STACK = RNG.integers(0, 256, (5, 7, 11), dtype=np.uint8)
COLOUR_STACK = RNG.integers(0, 256, (5, 7, 11, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "pixels", "has_channels"),
    [
        ("a.png", GRAY, False),
        ("a.PNG", COLOUR, True),
        ("a.png", DEEP, False),
        ("a.bmp", COLOUR, True),
        ("a.tif", GRAY, False),
        ("a.tiff", DEEP, False),
        ("a.tif", REAL, False),
        ("a.tif", STACK, False),
        ("a.tiff", COLOUR_STACK, True),
        ("a.tif", RNG.standard_normal((3, 7, 11)).astype(np.float32), False),
        ("a.npy", REAL.astype(np.float64), False),
        ("a.npy", RNG.integers(-99, 99, (5, 7, 11), dtype=np.int16), False),
        ("a.npy", COLOUR_STACK.astype(np.float32), True),
    ],
)
def test_round_trip(tmp_path: Path, name: str, pixels: np.ndarray, has_channels: bool):
    write_image(tmp_path / name, Image(pixels, has_channels))
    found = read_image(tmp_path / name)
    np.testing.assert_array_equal(found.pixels, pixels, strict=True)
    assert found.has_channels == has_channels
    assert found.pages == (pixels.shape[0] if pixels.ndim - has_channels == 3 else 1)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing else is left in the folder"


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_lossy_formats_come_close(tmp_path: Path, name: str):
    smooth = np.linspace(0, 255, 40 * 50).reshape(40, 50).astype(np.uint8)
    write_image(tmp_path / name, Image(np.stack([smooth, smooth, 255 - smooth], axis=-1), True))
    assert np.abs(read_image(tmp_path / name).pixels[..., 0].astype(int) - smooth).mean() < 8


def test_transparency_is_carried_along(tmp_path: Path):
    alpha = RNG.integers(0, 256, (7, 11), dtype=np.uint8)
    Pillow.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "in.png")
    image = read_image(tmp_path / "in.png")
    np.testing.assert_array_equal(image.pixels, COLOUR)
    write_image(tmp_path / "out.png", image.with_pixels(1 - COLOUR.astype(np.float32) / 255))
    with Pillow.open(tmp_path / "out.png") as file:
        np.testing.assert_array_equal(np.asarray(file), np.dstack([255 - COLOUR, alpha]))
    write_image(tmp_path / "out.jpg", image)  # has no transparency, and is no reason to fail
    assert read_image(tmp_path / "out.jpg").alpha is None


def test_other_colour_models_become_rgb(tmp_path: Path):
    Pillow.fromarray(COLOUR).convert("P").save(tmp_path / "palette.png")
    Pillow.fromarray(COLOUR).convert("CMYK").save(tmp_path / "print.tif")
    Pillow.fromarray(GRAY).convert("1").save(tmp_path / "fax.png")
    assert read_image(tmp_path / "palette.png").pixels.shape == (7, 11, 3)
    assert read_image(tmp_path / "print.tif").pixels.shape == (7, 11, 3)
    assert set(np.unique(read_image(tmp_path / "fax.png").pixels)) == {0, 255}


def test_a_camera_s_orientation_is_applied(tmp_path: Path):
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Pillow.fromarray(GRAY).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, np.rot90(GRAY, -1))


@given(st.sampled_from(["uint8", "uint16", "int16"]), st.floats(-2, 2))
def test_fractions_become_integers(kind: str, level: float):
    image = Image(np.zeros((2, 3), kind)).with_pixels(np.full((2, 3), level, np.float32))
    limits = np.iinfo(kind)
    assert str(image.pixels.dtype) == kind
    assert abs(int(image.pixels[0, 0]) - np.clip(level * limits.max, limits.min, limits.max)) <= 0.51


def make_bad(folder: Path) -> dict[str, Path]:
    """Files that are no pictures, each in its way."""
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("this is not a picture\n" * 10)
    (folder / "words.npy").write_text("this is not an array\n" * 10)
    Pillow.fromarray(RNG.integers(0, 256, (70, 90), dtype=np.uint8)).save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:3000])
    (folder / "folder.png").mkdir()
    np.save(folder / "words2.npy", np.array([["a", "b"]]))
    np.save(folder / "flat.npy", np.zeros(5))
    np.save(folder / "nothing.npy", np.zeros((0, 5)))
    np.save(folder / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    pages = [Pillow.fromarray(GRAY), Pillow.fromarray(GRAY[:5])]
    pages[0].save(folder / "uneven.tif", save_all=True, append_images=pages[1:])
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "input must exist, got .*missing.png.* check the path"),
        ("folder.png", "input must be a file, got the folder"),
        ("empty.png", "input must hold a picture, got the empty file"),
        ("words.png", "input must be a picture, got .* which no reader recognizes"),
        ("half.png", "input must be a whole picture, got .*half.png.*, which is damaged"),
        ("words.txt", "input must end in one of .png, .jpg"),
        ("words.npy", "input must be a NumPy array"),
        ("words2.npy", "input must hold real numbers, got <U1"),
        ("objects.npy", "input must be a NumPy array"),
        ("flat.npy", r"2 or 3 axes beside colours, got shape \(5,\)"),
        ("nothing.npy", "at least one pixel"),
        ("uneven.tif", "pages of one size and kind, got 2 kinds"),
    ],
)
def test_what_is_not_read(tmp_path: Path, name: str, message: str):
    make_bad(tmp_path)
    with pytest.raises(InvalidProblem, match=message):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.tif"])
def test_what_is_too_large_for_memory_is_not_read(tmp_path: Path, name: str):
    pixels = STACK if name == "a.tif" else COLOUR
    write_image(tmp_path / name, Image(pixels, name != "a.tif"))
    needed = 4 * 3 * pixels.size
    assert read_image(tmp_path / name, memory_bytes=needed).pixels.size == pixels.size
    with pytest.raises(InvalidProblem, match=f"too large for memory: .* holds {pixels.size} values"):
        read_image(tmp_path / name, memory_bytes=needed - 1)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("no/a.png", Image(GRAY), "output must lie in a folder that exists"),
        ("folder.png", Image(GRAY), "output must be a file, got the folder"),
        ("a.gif", Image(GRAY), "output must end in one of"),
        ("a.png", Image(STACK), "must end in .tif, .npy or .nii to hold a stack of 5, got 'a.png'"),
        ("a.jpg", Image(DEEP), "must end in .tif or .npy to hold uint16, got 'a.jpg'"),
        ("a.png", Image(REAL), "must end in .tif or .npy to hold float32"),
        ("a.tif", Image(REAL.astype(np.float64)), "must end in .npy to hold float64"),
        ("a.png", Image(COLOUR.astype(np.uint16), True), "must end in .npy to hold colours of uint16"),
    ],
)
def test_what_is_not_written(tmp_path: Path, name: str, image: Image, message: str):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidProblem, match=message):
        check_output(tmp_path / name, image)
    with pytest.raises(InvalidProblem, match=message):
        write_image(tmp_path / name, image)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_nifti(tmp_path: Path):
    volume = Image(RNG.standard_normal((4, 5, 6)).astype(np.float32), extras={"affine": np.diag([2.0, 3.0, 4.0, 1.0])})
    try:
        import nibabel  # noqa: F401
    except ModuleNotFoundError:
        (tmp_path / "a.nii.gz").write_bytes(b"something")
        with pytest.raises(Unsupported, match=r"pip install nibabel, or convert to \.npy"):
            read_image(tmp_path / "a.nii.gz")
        with pytest.raises(Unsupported, match="pip install nibabel"):
            check_output(tmp_path / "b.nii")
        return
    write_image(tmp_path / "a.nii.gz", volume)
    found = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found.pixels, volume.pixels)
    np.testing.assert_array_equal(found.extras["affine"], volume.extras["affine"])


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_file_is_not_there(tmp_path: Path, failure: BaseException, existed: bool):
    path = tmp_path / "a.bin"
    if existed:
        path.write_bytes(b"old and whole")

    def write(file: Any) -> None:
        file.write(b"half of")
        raise failure

    with pytest.raises(type(failure)):
        write_whole(path, write)
    assert [entry.name for entry in tmp_path.iterdir()] == (["a.bin"] if existed else [])
    assert not existed or path.read_bytes() == b"old and whole"


def test_files_have_the_rights_of_any_other(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new.bin", lambda file: file.write(b"x"))
        (tmp_path / "old.bin").touch()
        (tmp_path / "old.bin").chmod(0o600)
        write_whole(tmp_path / "old.bin", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new.bin", "old.bin")]
    assert rights == [0o640, 0o600]
