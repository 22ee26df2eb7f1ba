"""State dicts of others, as ours and back: the official NAT and DiNAT checkpoints, and Hugging Face's Dinat.

Names differ, numbers do not: going there and back gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vicinal.errors import InvalidProblem
from vicinal.models.transformer import Architecture

State = dict[str, Tensor]

_BLOCK = r"levels\.(\d+)\.blocks\.(\d+)"
_LAYER = r"encoder\.levels\.(\d+)\.layers\.(\d+)"

# Ours, theirs; each side is what the other's pattern is replaced by, with the numbers of level and block.
_HUGGING_FACE = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "embeddings.norm"),
    ("levels.{}.blocks.{}.norm1", "encoder.levels.{}.layers.{}.layernorm_before"),
    ("levels.{}.blocks.{}.attn.rpb", "encoder.levels.{}.layers.{}.attention.self.rpb"),
    ("levels.{}.blocks.{}.attn.proj", "encoder.levels.{}.layers.{}.attention.output.dense"),
    ("levels.{}.blocks.{}.norm2", "encoder.levels.{}.layers.{}.layernorm_after"),
    ("levels.{}.blocks.{}.mlp.fc1", "encoder.levels.{}.layers.{}.intermediate.dense"),
    ("levels.{}.blocks.{}.mlp.fc2", "encoder.levels.{}.layers.{}.output.dense"),
    ("levels.{}.downsample", "encoder.levels.{}.downsample"),
    ("norm", "layernorm"),
    ("head", "classifier"),
)
_QKV = ("query", "key", "value")


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`name` with the first pattern that it begins with replaced; `{}` stands for a number."""
    for source, target in pairs:
        found = re.match(re.escape(source).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)", name)
        if found:
            return target.format(*found.groups()) + name[found.end() :]
    raise InvalidProblem(f"state dict: {name!r} is not a parameter of a neighborhood attention transformer")


def from_huggingface(state: Mapping[str, Tensor]) -> State:
    """Weights of `DinatModel`, `DinatForImageClassification` or `DinatBackbone`, named as ours.

    Args:
        state: their `state_dict()`.

    Returns:
        What `NeighborhoodTransformer.load_state_dict` takes; for a backbone, what `Features(model, norm=True)`
        takes, whose norms follow the maps of levels. A bare `DinatModel` has no `head`.

    Raises:
        InvalidProblem: naming a parameter that these models do not have.

    Example:
        >>> list(from_huggingface({"dinat.layernorm.weight": torch.ones(4), "classifier.bias": torch.zeros(9)}))
        ['norm.weight', 'head.bias']
    """
    theirs = {name.removeprefix("dinat."): tensor for name, tensor in state.items()}
    is_backbone = any(name.startswith("hidden_states_norms.") for name in theirs)
    ours: State = {}
    backwards = [(there, here) for here, there in _HUGGING_FACE]
    for name, tensor in theirs.items():
        if found := re.match(_LAYER + r"\.attention\.self\.(query|key|value)\.(weight|bias)$", name):
            level, block, which, kind = found.groups()
            if which == "query":
                prefix = name.removesuffix(f"query.{kind}")
                parts = [theirs[f"{prefix}{part}.{kind}"] for part in _QKV]
                ours[f"levels.{level}.blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
        elif found := re.match(_LAYER + r"\.layer_scale_parameters$", name):
            for number, gamma in enumerate(tensor.unbind(), start=1):
                ours["levels.{}.blocks.{}.gamma{}".format(*found.groups(), number)] = gamma
        elif found := re.match(r"hidden_states_norms\.stage(\d+)\.(weight|bias)$", name):
            ours[f"norms.{int(found[1]) - 1}.{found[2]}"] = tensor
        else:
            ours[_rename(name, backwards)] = tensor
    if not is_backbone:
        return ours
    return {name if name.startswith("norms.") else f"model.{name}": tensor for name, tensor in ours.items()}


def to_huggingface(state: Mapping[str, Tensor]) -> State:
    """Our weights named as Hugging Face's: a classifier's (`dinat.`, `classifier`), or a backbone's.

    Args:
        state: of a `NeighborhoodTransformer`, or of `Features(model, norm=True)`.

    Raises:
        InvalidProblem: naming a parameter that these models do not have.

    Example:
        >>> list(to_huggingface({"norm.weight": torch.ones(4), "head.bias": torch.zeros(9)}))
        ['dinat.layernorm.weight', 'classifier.bias']
    """
    is_backbone = any(name.startswith("norms.") for name in state)
    theirs: State = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if found := re.match(_BLOCK + r"\.attn\.qkv\.(weight|bias)$", name):
            level, block, kind = found.groups()
            for which, part in zip(_QKV, tensor.chunk(3), strict=True):
                theirs[f"encoder.levels.{level}.layers.{block}.attention.self.{which}.{kind}"] = part
        elif found := re.match(_BLOCK + r"\.gamma1$", name):
            both = [tensor, state[next(n for n in state if n.endswith(name.replace("gamma1", "gamma2")))]]
            theirs["encoder.levels.{}.layers.{}.layer_scale_parameters".format(*found.groups())] = torch.stack(both)
        elif found := re.match(r"norms\.(\d+)\.(weight|bias)$", name):
            theirs[f"hidden_states_norms.stage{int(found[1]) + 1}.{found[2]}"] = tensor
        elif not name.endswith(".gamma2"):
            theirs[_rename(name, _HUGGING_FACE)] = tensor
    if is_backbone:
        return theirs
    return {name if name.startswith("classifier") else f"dinat.{name}": tensor for name, tensor in theirs.items()}


def from_official(checkpoint: Mapping[str, Any]) -> State:
    """Weights of an official NAT, DiNAT, DiNAT_s or isotropic checkpoint, named as ours.

    NAT's and DiNAT's names are ours. DiNAT_s has `layers` for our `levels`; isotropic models have blocks in
    `layers` directly. A checkpoint of a training run may hold its weights under `state_dict` or `model`.

    Args:
        checkpoint: what `torch.load` gives.

    Returns:
        What `NeighborhoodTransformer.load_state_dict` takes.

    Example:
        >>> list(from_official({"model": {"layers.0.blocks.1.attn.rpb": torch.zeros(2, 13, 13)}}))
        ['levels.0.blocks.1.attn.rpb']
    """
    state: Mapping[str, Any] = checkpoint
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), Mapping) else state
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    is_flat = not any(".blocks." in name for name in state)
    first = "levels.0.blocks." if is_flat else "levels."
    return {re.sub(r"^layers\.", first, name): tensor for name, tensor in state.items()}


def to_official(state: Mapping[str, Tensor], architecture: Architecture) -> State:
    """Our weights named as in the official checkpoints of that architecture.

    Args:
        state: of a `NeighborhoodTransformer`.
        architecture: whose names differ: DiNAT_s, isotropic models, or all others.

    Example:
        >>> from vicinal.models import ARCHITECTURES
        >>> list(to_official({"levels.0.blocks.1.attn.rpb": torch.zeros(3, 13, 13)}, ARCHITECTURES["dinat_s_tiny"]))
        ['layers.0.blocks.1.attn.rpb']
    """
    if architecture.tokens == "conv":
        return dict(state)
    first = "levels.0.blocks." if len(architecture.depths) == 1 else "levels."
    return {re.sub("^" + re.escape(first), "layers.", name): tensor for name, tensor in state.items()}


def architecture_of(config: Any) -> Architecture:
    """The architecture that a Hugging Face `DinatConfig` describes.

    Args:
        config: a `DinatConfig`, or whatever has its attributes.

    Raises:
        InvalidProblem: if it asks for what these models do not have: another activation, or other normalisation.

    Example:
        >>> architecture_of(transformers.DinatConfig()).depths  # doctest: +SKIP
        (3, 4, 6, 5)
    """
    for name, wanted in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("patch_size", 4), ("qkv_bias", True)):
        if getattr(config, name) != wanted:
            raise InvalidProblem(f"config.{name} must be {wanted!r}, got {getattr(config, name)!r}")
    scale = float(config.layer_scale_init_value)
    return Architecture(
        embed_dim=config.embed_dim,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        mlp_ratio=config.mlp_ratio,
        kernel_size=config.kernel_size,
        dilations=tuple(tuple(level) for level in config.dilations),
        layer_scale=scale if scale > 0 else None,
        drop_path_rate=config.drop_path_rate,
    )
