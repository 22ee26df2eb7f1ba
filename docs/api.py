"""Writes docs/api.md from the docstrings: `make docs`. A test fails where the page is not what this writes."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
WIDTH = 110


class Group(NamedTuple):
    """Names that a user meets together."""

    title: str
    words: str
    names: dict[str, str]
    """By module, names in the order in which they are met; those that differ in a number only are joined by `/`."""


GROUPS = (
    Group(
        "Attention",
        "Functions of tensors `[B, *S, H, D]`: batch, one to three spatial axes, heads, elements of a head.",
        {
            "vicinal": "neighborhood_attention neighborhood_attention_packed attention_with_lse merge_attentions "
            "neighborhood_scores neighborhood_aggregate na1d/na2d/na3d",
            "vicinal.denoise": "denoise estimate_sigma",
        },
    ),
    Group(
        "Layers",
        "",
        {
            "vicinal.nn": "NeighborhoodAttention "
            "NeighborhoodAttention1D/NeighborhoodAttention2D/NeighborhoodAttention3D Rotary",
        },
    ),
    Group(
        "Problems, plans and who runs them",
        "What is asked, how it is cut, and which backend does it. None of this needs tensors.",
        {
            "vicinal": "Problem Tiling make_plan Plan explain InvalidProblem Unsupported",
            "vicinal.problem": "Axis",
            "vicinal.window": "window viewers",
        },
    ),
    Group(
        "Prediction",
        "`vicinal.simulate` and `vicinal.suggest` are functions; what else their modules have is imported from there: "
        "`from vicinal.simulate import Estimate`.",
        {
            "vicinal": "simulate suggest Hardware",
            "vicinal.simulate": "Estimate Speedup end_to_end",
            "vicinal.suggest": "Suggestions sweep",
            "vicinal.plots": "draw_windows draw_plan draw_speedups draw_benchmark",
        },
    ),
    Group(
        "Tuning",
        "See also [environment](environment.md).",
        {"vicinal.tuning": "tune tuning Finding", "vicinal.tuned": "cache_folder"},
    ),
    Group(
        "Models",
        "See also [models](models.md).",
        {
            "vicinal.models": "create_model NeighborhoodTransformer Features Architecture ARCHITECTURES default_cfgs",
            "vicinal.models.weights": "from_official to_official from_huggingface to_huggingface architecture_of",
            "vicinal.models.unet": "UNet UShape",
        },
    ),
    Group(
        "Other libraries",
        "One module per library; none is imported before it is asked for. See also [Coming from NATTEN](natten.md).",
        {
            "vicinal.integrations.diffusers": "sparsify desparsify Window LTX2DecoderProcessor require_diffusers",
            "vicinal.integrations.diffusers.handle": "Sparsified",
            "vicinal.integrations.presets": "preset_names load_preset Preset",
            "vicinal.integrations.transformers": "register patch_dinat windowed",
            "vicinal.integrations.timm": "register",
            "vicinal.integrations.natten": "install uninstall",
            "vicinal.integrations.natten_kernel": "write_natten_kernel",
        },
    ),
    Group("Training", "See also [training](training.md).", {"vicinal.train": "Run Recipe Task"}),
    Group(
        "Testing, and backends of your own",
        "The laws that every backend must obey, and the protocol of one; see [CONTRIBUTING](../CONTRIBUTING.md).",
        {
            "vicinal.testing": "check_backend LAWS Law Finding Report fuzz assert_as_good_as_eager",
            "vicinal.testing.strategies": "axes grids problems tilings",
            "vicinal.backends.base": "Backend Inputs Output Gradients",
        },
    ),
)


def entries(group: Group) -> Iterator[tuple[str, list[str]]]:
    """Of each entry its module, and the names that share it."""
    for module, words in group.names.items():
        for joined in words.split():
            yield module, joined.split("/")


def page() -> str:
    """The whole page."""
    lines = [
        "# All public names",
        "",
        "Written by [api.py](api.py) from the docstrings, of which these are the first lines. The rest (arguments,",
        "units, limits, errors, sources, and examples that run) is in the source, and in `help(name)`.",
        "`Each[int]` is one integer for all axes, or one per axis.",
        "",
    ]
    for group in GROUPS:
        links = [f"[`{name}`](#{_slug(_heading(*entry))})" for entry in entries(group) for name in entry[1]]
        lines.append(f"* **[{group.title}](#{_slug(group.title)})**: {', '.join(links)}")
    for group in GROUPS:
        lines += ["", f"## {group.title}", *(["", group.words] if group.words else [])]
        for module, names in entries(group):
            lines += ["", *_entry(module, names)]
    return "\n".join(lines) + "\n"


def _heading(module: str, names: list[str]) -> str:
    return ", ".join([f"`{module}.{names[0]}`", *(f"`{name}`" for name in names[1:])])


def _entry(module: str, names: list[str]) -> list[str]:
    thing = getattr(importlib.import_module(module), names[0])
    if callable(thing):
        source, words = importlib.import_module(thing.__module__).__file__, inspect.getdoc(thing)
    else:
        source, words = _words_below(module, names[0])
    link = Path("..") / Path(str(source)).resolve().relative_to(HERE.parent)
    lines = [f"### {_heading(module, names)}", ""]
    if callable(thing) and not _is_nothing_to_call(thing):
        lines += ["```py", *_signature(names[0], thing), "```", ""]
    lines += _first_lines(words)
    members = [f"* {member}" for member in _members(thing)]
    return [*lines, "", *([*members, ""] if members else []), f"[source]({link.as_posix()})"]


def _is_nothing_to_call(thing: Any) -> bool:
    return isinstance(thing, type) and (issubclass(thing, Exception) or getattr(thing, "_is_protocol", False))


def _signature(name: str, thing: Any) -> list[str]:
    """As it would be written, without breaking an argument."""
    parameters: list[str] = []
    signature, seen = inspect.signature(thing), None
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and seen not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parameters.append("*")
        seen = parameter.kind
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {_default(thing, parameter.default)}"
        parameters.append(text)
    known = not isinstance(thing, type) and signature.return_annotation is not signature.empty
    end = f" -> {_type(signature.return_annotation)}" if known else ""
    line = f"{name}({', '.join(parameters)}){end}"
    if len(line) <= WIDTH:
        return [line]
    inside = textwrap.wrap(", ".join(word.replace(" ", "\0") for word in parameters) + ",", WIDTH - 4)
    return [f"{name}(", *(f"    {row}".replace("\0", " ") for row in inside), f"){end}"]


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__forward_arg__", annotation)
    if isinstance(text, str):
        return text
    text = re.sub(r"ForwardRef\('(.*?)'\)", r"\1", inspect.formatannotation(text))
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text)


def _default(thing: Any, value: Any) -> str:
    """A constant by its name, for many would fill pages; else as it prints."""
    if isinstance(value, str):
        return json.dumps(value)
    constants = vars(importlib.import_module(thing.__module__)).items() if isinstance(value, tuple) and value else ()
    found = [name for name, each in constants if each is value and name.isupper()]
    text = found[0] if found else repr(value)
    return text if len(text) <= 40 and not text.startswith("<") else "..."


def _first_lines(text: str | None) -> list[str]:
    """What comes before arguments, results, errors and examples."""
    assert text, "a public name has no docstring"
    sections = r"^(?:Args|Returns|Raises|Warns|Example|Source|Tried with)\b"
    return re.split(sections, text, flags=re.MULTILINE)[0].rstrip().split("\n")


def _members(thing: Any) -> list[str]:
    """Methods and properties of a class, with the first sentence of each."""
    found: list[str] = []
    for name, member in vars(thing).items() if isinstance(thing, type) else ():
        text = inspect.getdoc(member)
        is_ours = callable(member) or isinstance(member, classmethod | staticmethod | property)
        if name.startswith("_") or not is_ours or not text or _is_inherited(thing, name, text):
            continue
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        inside = ""
        if not isinstance(member, property):
            arguments = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
            stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
            inside = f"({', '.join(stars.get(p.kind, '') + p.name for p in arguments)})"
        sentence = " ".join(_first_lines(text)).split("  ")[0].strip()
        found.append(f"`.{name}{inside}`: {sentence}")
    return found


def _is_inherited(thing: type, name: str, text: str) -> bool:
    return any(inspect.getdoc(getattr(base, name, None)) == text for base in thing.__mro__[1:])


@lru_cache
def _tree(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text())


def _words_below(package: str, name: str) -> tuple[str, str]:
    """The file in the package that makes a constant, and the string below it."""
    modules = sorted(key for key in sys.modules if f"{key}.".startswith(f"{package}."))  # the package first
    for path in [sys.modules[key].__file__ for key in modules]:
        body = _tree(str(path)).body
        for statement, below in pairwise(body):
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            is_named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if is_named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                return str(path), str(below.value.value)
    raise SystemExit(f"{package}.{name} has no words below it")


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    (HERE / "api.md").write_text(page())
