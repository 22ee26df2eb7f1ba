"""HunyuanVideo in 720p: a window of 18x24x24 tokens in frames, rows and columns, after fifteen dense steps.

python examples/hunyuan_video.py FOLDER   # a pipeline with its weights, on an accelerator
python examples/hunyuan_video.py          # random weights, a few seconds on a CPU: what the windows change
"""

import sys
from pathlib import Path

import torch

from vicinal.integrations.diffusers import sparsify
from vicinal.integrations.diffusers.zoo import specimen

MODEL = "hunyuan-video"
WINDOWS = {"kernel_size": (2, 3, 5), "stride": (2, 1, 2)}  # of the small model


def generate(folder: str) -> None:
    from diffusers import HunyuanVideoPipeline
    from diffusers.utils import export_to_video

    pipe = HunyuanVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    pipe.vae.enable_tiling()
    with sparsify(pipe.transformer, kernel_size=(18, 24, 24), stride=(16, 8, 8), dense_steps=15):
        video = pipe("a cat walks on grass", height=768, width=1280, num_frames=117, num_inference_steps=50).frames[0]
    export_to_video(video, "hunyuan.mp4", fps=15)


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
