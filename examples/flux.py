"""FLUX.1-dev at 4K: each image token sees a window of 80x80 tokens and all text, after nine dense steps.

python examples/flux.py FOLDER   # a pipeline with its weights, on an accelerator
python examples/flux.py          # random weights, a few seconds on a CPU: what the windows change
"""

import sys
from pathlib import Path

import torch

from vicinal.integrations.diffusers import sparsify
from vicinal.integrations.diffusers.zoo import specimen

MODEL = "flux"
WINDOWS = {"kernel_size": (4, 5), "stride": (2, 1), "dense_layers": 1}  # of the small model


def generate(folder: str) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    with sparsify(pipe.transformer, preset="flux-4k"):
        image = pipe("a lighthouse at dusk", height=4096, width=4096, num_inference_steps=28).images[0]
    image.save("flux.png")


def denoise(model: torch.nn.Module, arguments: dict, steps: int = 4) -> torch.Tensor:
    """Euler's method from noise to data, as flow matching has it."""
    arguments = dict(arguments)
    x = arguments.pop("hidden_states")
    for step in range(steps):
        arguments["timestep"] = torch.full_like(arguments["timestep"], 1.0 * (1 - step / steps))
        with torch.no_grad():
            velocity = model(hidden_states=x, **arguments, return_dict=False)[0]
        x = x - velocity / steps
    return x


def main() -> None:
    if len(sys.argv) > 1:
        if not (Path(sys.argv[1]) / "model_index.json").is_file():
            sys.exit(f"FOLDER must hold a pipeline's weights and its model_index.json, got {sys.argv[1]!r}")
        generate(sys.argv[1])
        return
    torch.manual_seed(0)
    model = specimen(MODEL).build(tiny=True)
    arguments = specimen(MODEL).arguments(model, tiny=True)
    dense = denoise(model, arguments)
    with sparsify(model, **WINDOWS) as handle:
        sparse = denoise(model, arguments)
        print(handle)
    print(f"windows changed the result by {(sparse - dense).norm() / dense.norm():.1%}; weights are random")


if __name__ == "__main__":
    main()
