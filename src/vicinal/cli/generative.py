"""`e2e`, `generate`, `natten-kernel`: whole generative models."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vicinal._tuples import times
from vicinal.cli._console import Json, progress, say, say_json
from vicinal.cli._options import SHAPE, numbers
from vicinal.errors import InvalidProblem

KernelSize = Annotated[
    str | None, typer.Option("--kernel-size", "-k", metavar=SHAPE, help="Window: tokens, shares such as 0.5, -1.")
]
Stride = Annotated[str, typer.Option("--stride", "-s", metavar=SHAPE, help="Queries that share a window.")]
Dilation = Annotated[str, typer.Option("--dilation", "-d", metavar=SHAPE, help="Distance between keys.")]
PresetName = Annotated[
    str | None, typer.Option("--preset", help="Published windows by name, instead of --kernel-size.")
]


def e2e(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="flux, hunyuan-video, wan-14b, cosmos-7b, ...")],
    grid: Annotated[str | None, typer.Option(metavar=SHAPE, help="Tokens per axis, if not the model's own.")] = None,
    kernel_size: KernelSize = None,
    stride: Stride = "1",
    dilation: Dilation = "1",
    preset: PresetName = None,
    dense_steps: Annotated[int, typer.Option(help="Of --steps, how many stay dense.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps of a run.")] = 1,
    layers: Annotated[int | None, typer.Option(help="Build only so many, and scale times up.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed passes of each way.")] = 3,
    tiny: Annotated[bool, typer.Option("--tiny", help="A configuration that any CPU runs.")] = False,
    device: Annotated[str | None, typer.Option(help="Where: cpu, cuda, ...; by default the accelerator.")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Add the rows to this table.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Chart to write, PNG or SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Time a step of a whole model, dense and with windows, beside the simulator's prediction.

    Weights are random: times do not depend on them. `vicinal generate` runs a pipeline with its own.
    """
    import torch

    from vicinal._figure import check
    from vicinal.bench.e2e import measure
    from vicinal.bench.e2e_result import COLUMNS, save
    from vicinal.bench.results import check_appendable
    from vicinal.cli._machine import torch_device

    if table is not None:
        check_appendable(table, COLUMNS)
    if out is not None:
        check(out)
    place = torch_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    window = _window(kernel_size, stride, dilation, preset)
    with progress(model) as update:
        found = measure(
            model,
            window=window,
            grid=None if grid is None else numbers(grid, "grid"),
            tiny=tiny,
            layers=layers,
            repeats=repeats,
            dense_steps=dense_steps,
            steps=steps,
            device=place,
            progress=update,
        )
    if table is not None:
        save(table, [found])
    if as_json:
        say_json(found.rows())
    else:
        say(found)
    if out is not None:
        from vicinal.bench.e2e_chart import draw

        say(f"wrote {draw([found], out)}")


def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A pipeline on disk, as save_pretrained writes it.")],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    kernel_size: KernelSize = None,
    stride: Stride = "1",
    dilation: Dilation = "1",
    preset: PresetName = None,
    dense_steps: Annotated[int | None, typer.Option(help="First steps that stay dense; the preset's, or none.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, if not the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise that both start from.")] = 0,
    size: Annotated[
        str | None, typer.Option(metavar="[FRAMESx]ROWSxCOLUMNS", help="In pixels, if not the pipeline's own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where: cpu, cuda, ...; by default the accelerator.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG: dense frames above those with windows.")] = None,
    as_json: Json = False,
) -> None:
    """Generate twice from one seed, dense and with windows: times, PSNR, SSIM and the pictures."""
    import torch

    from vicinal.bench.generate import generate, load_pipeline
    from vicinal.cli._machine import torch_device
    from vicinal.images import Image, check_output, write_image

    if out is not None:
        check_output(out)
    window = _window(kernel_size, stride, dilation, preset)
    if not window:
        raise InvalidProblem("pass --kernel-size or --preset: without windows there is nothing to compare")
    if dense_steps is not None:
        window["dense_steps"] = dense_steps
    if steps is not None and steps < 1:
        raise InvalidProblem(f"steps must be at least 1, got {steps}")
    sizes = {} if size is None else _sizes(numbers(size, "size"))
    place = torch_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe = load_pipeline(folder, place, torch.float32 if place.type == "cpu" else torch.bfloat16)
    found = generate(pipe, window, prompt=prompt, seed=seed, steps=steps, sizes=sizes)
    if as_json:
        say_json(found.summary())
    else:
        say(found)
    if out is not None:
        write_image(out, Image(found.sheet(), has_channels=True))
        say(f"wrote {out}")


def natten_kernel(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
) -> None:
    """Write a folder with which unmodified code that loads NATTEN by `kernels` runs our functions instead."""
    from vicinal.integrations.natten_kernel import write_natten_kernel

    name, value = write_natten_kernel(folder).split("=", 1)
    say(f"export {name}={shlex.quote(value)}")


def _lengths(text: str, name: str) -> Any:
    """`18x24x24`, `-1x0.5x0.5`, `7`: tokens, or shares where there is a point."""
    try:
        values = tuple(float(part) if "." in part else int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise InvalidProblem(f"{name} must be tokens or shares joined by x, such as 18x24x24, got {text!r}") from None
    return values[0] if len(values) == 1 else values


def _window(kernel_size: str | None, stride: str, dilation: str, preset: str | None) -> dict[str, Any]:
    """Arguments of `sparsify`; none if no window was named."""
    window: dict[str, Any] = {}
    if kernel_size is not None:
        lengths = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        window = {name: _lengths(text, name) for name, text in lengths.items()}
    elif (stride, dilation) != ("1", "1"):
        raise InvalidProblem("stride and dilation need --kernel-size")
    if preset is not None:
        window["preset"] = preset
    return window


def _sizes(lengths: tuple[int, ...]) -> dict[str, int]:
    """What pipelines call them."""
    if len(lengths) not in (2, 3) or min(lengths) < 1:
        raise InvalidProblem(f"size must be ROWSxCOLUMNS or FRAMESxROWSxCOLUMNS, 1 or more each, got {times(lengths)}")
    return dict(zip(("num_frames", "height", "width")[-len(lengths) :], lengths, strict=True))
