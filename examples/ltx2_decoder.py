"""LTX-2.5 decodes its videos by 3-D neighborhood attention: ours runs it on any device, and never builds a mask.

    python examples/ltx2_decoder.py FOLDER   # the decoder's weights, on an accelerator: 121 frames of 704x1280
    python examples/ltx2_decoder.py          # random weights, a few seconds on a CPU

Code that cannot be changed runs ours as well: `eval "$(vicinal natten-kernel DIR)"` before it.
"""

import sys
import time
from pathlib import Path

import torch

from vicinal.integrations.diffusers import LTX2DecoderProcessor
from vicinal.integrations.diffusers.zoo import specimen


def decode(model: torch.nn.Module, latent: torch.Tensor) -> torch.Tensor:
    """The video `[B, 3, frames, height, width]` that belongs to a latent; the noise in it is always the same."""
    generator = torch.Generator(latent.device).manual_seed(0)
    with torch.no_grad():
        return model.decode(latent, generator=generator).sample


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        if not (Path(sys.argv[1]) / "config.json").is_file():
            sys.exit(f"FOLDER must hold the decoder's weights and its config.json, got {sys.argv[1]!r}")
        from diffusers import LTX2VideoDiffusionDecoderModel

        model = LTX2VideoDiffusionDecoderModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to("cuda")
        latent = torch.randn(1, model.config.latent_channels, 16, 22, 40, device="cuda", dtype=torch.bfloat16)
    else:
        model = specimen("ltx2-decoder").build(tiny=True)
        latent = specimen("ltx2-decoder").arguments(model, tiny=True)["z"]
    model.set_attn_processor(LTX2DecoderProcessor())
    begin = time.perf_counter()
    video = decode(model, latent)
    print(f"{tuple(latent.shape)} -> {tuple(video.shape)} in {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
