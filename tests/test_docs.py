"""The pages tell the truth: their code runs, their links lead somewhere, their commands are accepted."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@every_page
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Blocks marked `python` are run one after another; those marked `py` need weights or a GPU, and are only read."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    for block in blocks(page, "py") if page.name != "api.md" else ():  # signatures are no statements
        compile(block, page.name, "exec")


def test_the_readme_shows_code():
    assert blocks(ROOT / "README.md", "python")


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as code hosts make them of their words."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}, a heading that is not there"


@every_page
def test_tables_have_rows_of_equal_width(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE):
        rows = [re.sub(r"`[^`]*`", "", row).count("|") for row in table.splitlines()]
        assert len(rows) > 2, f"{page.name} has a table without rows: {table}"
        assert len(set(rows)) == 1, f"{page.name} has a table of uneven rows: {table}"


def shell(page: Path) -> list[str]:
    lines = "".join(blocks(page, "sh")).splitlines()
    return [re.sub(r"\s+#.*", "", line).removeprefix(".venv/bin/") for line in lines]


@every_page
def test_commands_are_accepted(page: Path):
    """Lines of shell are read by the parser of the command line, not run; of words in a text, options must be known."""
    from vicinal.cli import app

    group: Any = typer.main.get_command(app)
    for line in shell(page):
        match shlex.split(line):
            case ["vicinal", name, *words] if name != "--help":
                assert name in group.commands, f"{page.name}: {line}"
                with group.commands[name].make_context(name, words):
                    pass
    for words in re.findall(r"`vicinal (\w[^`]*)`", page.read_text()):
        name, *options = re.findall(r"^[\w-]+|--[a-z-]+", words)
        assert name in group.commands, f"{page.name}: {words}"
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert known.issuperset(options), f"{page.name}: {words}"


@every_page
def test_targets_of_make_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    lines = shell(page) + re.findall(r"`(make [^`]*)`", page.read_text())
    for target in re.findall(r"^make (\w+)", "\n".join(lines), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, f"{page.name}: make {target}"


def test_the_table_of_forward_passes_is_that_of_its_file():
    from vicinal.bench import results, table

    _, rows = table.table(results.load(ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/2026-11-22.csv"))
    lines = (ROOT / "docs/measured.md").read_text().splitlines()
    for case, _, hopper, *peers in rows:
        said = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {case} | {hopper} | ")]
        assert len(said) == 1, f"docs/measured.md has {len(said)} lines of {case} as the file has it"
        assert [cell.strip() for cell in said[0][3:]] == [cell for cell in peers if cell]


def test_the_index_lists_every_page():
    listed = re.findall(r"^\| \[.*?\]\((.*?)\)", (ROOT / "docs/README.md").read_text(), flags=re.MULTILINE)
    there = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")} - {"README.md"}
    assert there == {path for path in listed if not path.startswith("..")}
    assert "](docs/README.md)" in (ROOT / "README.md").read_text()


def test_the_page_of_benchmarks_lists_every_script():
    listed = set(re.findall(r"\]\((\w+\.py)\)", (ROOT / "benchmarks/README.md").read_text()))
    assert listed == {path.name for path in ROOT.glob("benchmarks/*.py")}


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    """The script that writes the page of public names."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -r requirements-models.txt")
    return runpy.run_path(str(ROOT / "docs/api.py"))


def test_the_page_of_public_names_is_what_its_script_writes(api: dict[str, Any]):
    written = (ROOT / "docs/api.md").read_text()
    assert written == api["page"](), "a public signature or docstring has changed; run: make docs"


@pytest.mark.parametrize("package", ["", ".nn", ".models", ".train", ".testing", ".integrations.diffusers"])
def test_every_public_name_is_on_the_page(api: dict[str, Any], package: str):
    module = importlib.import_module(f"vicinal{package}")
    entries = [entry for group in api["GROUPS"] for entry in api["entries"](group)]
    assert set(module.__all__) == {name for path, names in entries if path == module.__name__ for name in names}


MADE_BY = {
    "vicinal.simulate.Speedup": "vicinal.simulate.Estimate",
    "vicinal.tuning.Finding": "vicinal.tuning.tune",
    "vicinal.train.Task": "vicinal.train.Run",
    "vicinal.testing.Finding": "vicinal.testing.check_backend",
    "vicinal.testing.Report": "vicinal.testing.check_backend",
    "vicinal.backends.base.Output": "vicinal.backends.base.Backend",
    "vicinal.backends.base.Gradients": "vicinal.backends.base.Backend",
}
"""What nobody makes by hand, and whose example has it."""


def callables(api: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for group in api["GROUPS"] for entry in api["entries"](group)]
    found = {
        f"{path}.{name}": getattr(importlib.import_module(path), name) for path, names in entries for name in names
    }
    return {name: thing for name, thing in found.items() if callable(thing)}


def test_every_public_callable_has_an_example(api: dict[str, Any]):
    """In its docstring, in one of its methods', or in a block of a page that is run."""
    on_pages = "".join(block for page in PAGES for block in blocks(page, "python"))

    def has_example(name: str, thing: Any) -> bool:
        members = vars(thing).items() if isinstance(thing, type) else ()
        texts = [thing.__doc__, *(getattr(thing, key).__doc__ for key, _ in members if not key.startswith("_"))]
        return any(">>>" in (text or "") for text in texts) or f"{name.rpartition('.')[2]}(" in on_pages

    found = callables(api)
    shown = {name: MADE_BY.get(name, name) for name in found}
    assert not [name for name, there in shown.items() if not has_example(there, found[there])]


def test_every_public_callable_tells_its_arguments_and_errors(api: dict[str, Any]):
    missing: list[str] = []
    for name, thing in callables(api).items():
        if api["_is_nothing_to_call"](thing) or name == "vicinal.tuning.Finding":
            continue
        text = thing.__doc__ or ""
        code = (
            "" if ".strategies." in name else inspect.getsource(inspect.unwrap(thing))
        )  # hypothesis has wrapped those
        if isinstance(thing, type):
            code = "".join(
                re.findall(r"^    def __(?:post_)?init__.*?(?=^    def |\Z)", code, flags=re.DOTALL | re.MULTILINE)
            )
        raises = re.search(r"raise (InvalidProblem|Unsupported)", code)
        if inspect.signature(thing).parameters and "Args:" not in text:
            missing.append(f"{name}: Args")
        if raises and "Raises" not in text:
            missing.append(f"{name}: Raises")
    assert not missing


def test_presets_and_models_are_those_that_there_are():
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")
    from vicinal.integrations.diffusers.zoo import ZOO
    from vicinal.integrations.presets import load_preset, preset_names

    text = (ROOT / "docs/generative.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` .* \| (\d+) of (\d+) \|", text, flags=re.MULTILINE)
    found = {name: load_preset(name) for name in preset_names()}
    assert {(name, int(dense), int(steps)) for name, dense, steps in rows} == {
        (name, preset.dense_steps, preset.steps) for name, preset in found.items()
    }
    (words,) = re.findall(r"dense and with windows: (.*?)\. With `--tiny`", text, flags=re.DOTALL)
    assert re.findall(r"`([^`]+)`", words) == list(ZOO)


def test_variables_are_those_that_are_read():
    """The page of variables names each one that the code asks for, and none of ours that nothing asks for."""
    code = {
        path: path.read_text() for folder in ("src", "tests", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    }
    ours = {name for text in code.values() for name in re.findall(r"VICINAL_[A-Z]+", text)}
    read = {
        name
        for path, text in code.items()
        if path.is_relative_to(ROOT / "src")
        for name in re.findall(r"environ(?:\.get|\.pop)?[\[(]\"(\w+)", text)
    }
    assert {"VICINAL_BACKEND", "VICINAL_CACHE", "VICINAL_TUNE"} <= ours and "TRITON_INTERPRET" in read
    text = (ROOT / "docs/environment.md").read_text()
    said = set(re.findall(r"`([A-Z][A-Z_]+)`", text))
    assert {name for name in said if name.startswith("VICINAL_")} == ours
    assert read <= said
    from vicinal import backends

    row = next(line for line in text.splitlines() if line.startswith("| `VICINAL_BACKEND`"))
    assert re.findall(r"`([a-z]+)`", row) == [backend.name for backend in backends.ALL]
