"""What README and docs/ say is true of the tree: links, commands, options, numbers."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shlex
import statistics
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.architectures import BUILT_IN
from kvcompile.adapters.catalogue import page
from kvcompile.config.compose import check
from kvcompile.stack import discover

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def section(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def module(path: Path) -> ModuleType:
    """A script of the repository, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def commands(text: str) -> list[list[str]]:
    """Overrides of every `kvcompile setting=value ...` line, but those with a placeholder or an example."""
    lines = re.findall(r"^(?: {4})?kvcompile ((?:-m |'?\w[\w.]*=).+)$", text, re.M)
    split = [shlex.split(line.removesuffix("\\"), comments=True) for line in lines]
    return [
        words for words in split if not any(re.search(r"<|\.\.\.|vnorm|vatp|anywhere|=toy", word) for word in words)
    ]


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.split()) <= 700
    indented = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    assert indented[0].startswith("make demo")
    assert indented[1].startswith("make test")


@every_page
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths from the root or from `kvcompile/`, and modules by their dotted names; `x` stands for any name."""
    text = page.read_text("utf-8") if page.name != "CHANGELOG.md" else ""
    for path in re.findall(r"`([\w-]+/[\w/.-]*\.(?:py|h|yaml|md))`", text):
        assert Path(path).stem == "x" or any((home / path).exists() for home in (ROOT, ROOT / "kvcompile")), path
    for name in re.findall(r"(?:from|import|python -m) (kvcompile(?:\.\w+)+)", text):
        assert importlib.util.find_spec(name), name
    for home, names in re.findall(r"^ *from (kvcompile[\w.]*) import (.+)$", text, re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(home), name) or importlib.util.find_spec(f"{home}.{name}"), name


@every_page
def test_commands_compose(page: Path) -> None:
    """Launchers apart, which come with packages of their own (tests/test_launchers.py)."""
    for words in commands(page.read_text("utf-8").replace("\\\n", " ")):
        settings = [word for word in words if word != "-m" and not re.match(r"\+?hydra[/.]launcher", word)]
        check(settings, "-m" in words)


def test_every_policy_has_a_section_with_its_options() -> None:
    titles = re.findall(r"^### (\w+)$", section("policies"), re.M)
    assert sorted(titles) == sorted(discover())
    assert re.findall(r"^<!-- options: (\w+) -->$", section("policies"), re.M) == titles
    for body in re.split(r"^### \w+$", section("policies"), flags=re.M)[1:]:
        assert all(f"**{word}.** " in body for word in ("Idea", "When", "Measured"))
        assert "\n    " in body  # a formula


@pytest.mark.parametrize("policy", sorted(discover()))
def test_every_option_is_described(policy: str) -> None:
    """The docstring of a policy says `field: what it does`; the site shows it in a table."""
    rows = [
        row.split("|")
        for row in module(ROOT / "docs" / "hooks.py").options(policy).splitlines()
        if row.startswith("| `")
    ]
    assert len(rows) == len(dataclasses.fields(discover()[policy]))
    assert [name for _, name, _, said, _ in rows if not said.strip()] == []


def test_the_page_on_models_is_the_table() -> None:
    """Made by: `python -c 'from kvcompile.adapters.catalogue import page; print(page())'`, behind its introduction."""
    assert section("models").partition("<!-- models -->\n\n")[2] == page()


def test_the_page_on_architectures_names_every_file_and_fact() -> None:
    page = section("add-an-architecture")
    for family in BUILT_IN.values():
        assert f"| `{family.place.partition(':')[0]}.py` |" in page
    for fact in dataclasses.fields(Architecture)[1:]:
        assert f"| `{fact.name}` |" in page


def test_every_recipe_is_listed() -> None:
    shipped = {f.name.removesuffix(".yaml") for f in files("kvcompile.recipes.recipe").iterdir()}
    assert shipped <= set(re.findall(r"`(\w+)`", section("recipes")))


def test_every_result_is_in_the_index() -> None:
    linked = set(re.findall(r"benchmarks/results/([\w-]+\.md)", section("results")))
    assert linked == {path.name for path in RESULTS.glob("*.md")}


def test_every_benchmark_is_in_the_index() -> None:
    named = set(re.findall(r"`(\w+\.py)`", section("results")))
    assert named == {path.name for path in (ROOT / "benchmarks").glob("*.py")}


ROWS = {
    "none": "dense",
    "attention_matching": "matched + centred int4, 1/24",
    **{name: f"{name} + int4, 1/24" for name in ("kvzip", "retrieval_heads", "ghost", "adakv", "snapkv")},
}


def test_numbers_of_the_readme_are_those_measured() -> None:
    """Answers that stay of those that the uncompressed model gives, and perplexity as a multiple of its."""
    rows = json.loads((RESULTS / "asked_later.json").read_text("utf-8"))
    table = re.findall(r"^\| `?([^|`]+?)`? \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", README, re.M)
    assert [name for name, *_ in table] == list(ROWS)

    def cells(label: str, form: str, what: str) -> list[Any]:
        named = [rows[label][f"{text}/{form}/hidden"] for text in ("python", "wikitext")]
        return [record[what] for cell in named for record in cell]

    for name, *kept, perplexity in table:
        for count, form in zip(kept, ("magic", "four_keys", "passcode"), strict=True):
            pairs = zip(cells(ROWS[name], form, "answers"), cells("dense", form, "answers"), strict=True)
            stay = sum(own[0] * theirs[0] for a, b in pairs for own, theirs in zip(a, b, strict=True))
            assert int(count) == stay
        losses = zip(cells(ROWS[name], "text", "loss"), cells("dense", "text", "loss"), strict=True)
        assert abs(float(perplexity) - math.exp(statistics.fmean(a - b for a, b in losses))) <= 0.0051


def test_the_citation_names_this_version() -> None:
    said = re.findall(r'^version(?:: | = )"?([\d.]+)"?$', (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert said == re.findall(r'^version = "([\d.]+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)


def test_the_picture_is_drawn_from_the_results() -> None:
    plot = module(ROOT / "benchmarks" / "plot_quality.py")
    assert set(plot.PLACES) <= set(plot.rows())
    above, below = plot.draw().axes
    assert sum(len(points.get_offsets()) for points in above.collections) == len(plot.rows())
    assert len(below.texts) == len(plot.PLACES)
