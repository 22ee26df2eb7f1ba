"""Cosmos-Predict2 2B with NVIDIA's own windows, which differ from layer to layer.

python examples/cosmos_predict2.py FOLDER   # a pipeline with its weights, on an accelerator
python examples/cosmos_predict2.py          # random weights, a few seconds on a CPU: what the windows change
"""

import sys
from pathlib import Path

import torch

from vicinal.integrations.diffusers import sparsify
from vicinal.integrations.diffusers.zoo import specimen

MODEL = "cosmos-predict2-2b"
WINDOWS = {"kernel_size": (-1, 3, 3), "dilation": (1, 2, 2)}  # of the small model


def generate(folder: str) -> None:
    from diffusers import Cosmos2VideoToWorldPipeline
    from diffusers.utils import export_to_video, load_image

    pipe = Cosmos2VideoToWorldPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    first = load_image(sys.argv[2])
    # Made for checkpoints that were trained with these windows; others lose quality.
    with sparsify(pipe.transformer, preset="cosmos-predict2-2b"):
        video = pipe(image=first, prompt="a robot arm sorts apples", num_frames=93).frames[0]
    export_to_video(video, "cosmos.mp4", fps=16)


def denoise(model: torch.nn.Module, arguments: dict, steps: int = 4) -> torch.Tensor:
    """Euler's method from noise to data, as flow matching has it."""
    arguments = dict(arguments)
    x = arguments.pop("hidden_states")
    for step in range(steps):
        arguments["timestep"] = torch.full_like(arguments["timestep"], 1000.0 * (1 - step / steps))
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
