"""`demo` and `denoise`: neighborhood attention at work on pictures."""

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from vicinal.cli._console import Json, progress, say, say_json
from vicinal.cli._options import SHAPE, Backend, each
from vicinal.errors import InvalidProblem


def denoise(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, stack or volume.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write it, without its noise.")],
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise's standard deviation, as a fraction of full range (10 of 255: 0.04). Else estimated."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="Filter strength, in the same units. Else 1.5 sigma.")
    ] = None,
    patch_size: Annotated[
        str | None, typer.Option(metavar=SHAPE, help="Side of the patches that are compared, odd. Else 5, volumes 3.")
    ] = None,
    patch_distance: Annotated[
        str | None, typer.Option(metavar=SHAPE, help="How far to search around a pixel. Else 8, volumes 4.")
    ] = None,
    components: Annotated[
        int, typer.Option(help="Principal components by which patches are compared; 0 compares whole patches.")
    ] = 15,
    memory: Annotated[float, typer.Option(metavar="GIB", help="For queries, keys and values.")] = 1.0,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Remove the noise from a photograph, an image stack or a volume, by non-local means.

    Reads and writes PNG, JPEG, TIFF (stacks too), BMP, WebP, .npy, and NIfTI if nibabel is installed.
    """
    from vicinal.images import check_output, read_image, write_image

    if strength is not None and not 0 < strength < math.inf:
        raise InvalidProblem(f"strength must be a finite number above 0, got {strength}")
    if sigma == 0 and strength is None:
        raise InvalidProblem("strength must be given where sigma is 0: without noise nothing says how much to smooth")
    if not 0 < memory < math.inf:
        raise InvalidProblem(f"memory must be a finite number of GiB above 0, got {memory}")
    check_output(target)
    with progress(f"reading {source.name}"):
        image = read_image(source)
        check_output(target, image)
    from vicinal import denoise as nlm

    with progress(f"denoising {source.name}") as update:
        begin = time.perf_counter()
        estimated = nlm.estimate_sigma(image.pixels, channel_axis=image.channel_axis) if sigma is None else sigma
        clean = nlm.denoise(
            image.pixels,
            sigma=sigma,
            h=strength,
            patch_size=None if patch_size is None else each(patch_size, "patch_size"),
            patch_distance=None if patch_distance is None else each(patch_distance, "patch_distance"),
            components=components or None,
            channel_axis=image.channel_axis,
            backend=backend,
            memory_bytes=int(memory * 2**30),
            progress=update,
        )
        seconds = time.perf_counter() - begin
    write_image(target, image.with_pixels(clean))
    if as_json:
        say_json({"input": str(source), "output": str(target), "image": str(image), "sigma": estimated, "s": seconds})
    else:
        origin = "estimated" if sigma is None else "given"
        say(f"{source.name}: {image}, noise {estimated:.3g} ({origin}); {seconds:.1f} s; wrote {target}")


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Picture to write, .png; the plan's figure goes beside it.")
    ] = Path("vicinal-demo.png"),
    picture: Annotated[
        str, typer.Option(help="astronaut, chelsea, coffee or camera, from scikit-image.")
    ] = "astronaut",
    sigma: Annotated[float, typer.Option(help="Noise to add: standard deviation, as a fraction of full range.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Denoise a real photograph and compare: with scikit-image, with dense attention, with the prediction."""
    from vicinal.cli import demo

    with progress("starting") as update:
        result = demo.run(picture, sigma, seed, out, update)
    if as_json:
        say_json(result.facts())
    else:
        result.show()
