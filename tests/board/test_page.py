"""Protects the page: one file that fetches nothing, names that never become markup, and, in a real browser, that it
sorts, filters, draws and is used by keyboard."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from board_rows import row

from kvcompile.board.page import page
from kvcompile.board.standings import board

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ODD = "<!--</script ><script>document.title = 'run'</script><img src=x onerror=alert(1)>"
VOID = ("meta", "input", "br", "link", "img")


def html() -> str:
    rows = [row(scores=[1] * 8, question=question) for question in ("hidden", "seen")]
    rows += [row("snapkv", [1, 0] * 4, 1 / 16, question="hidden"), row("snapkv", [1] * 8, 1 / 16, question="seen")]
    rows += [row("kivi", [1] * 7 + [0], 0.28), row("adakv", [0] * 8, 1 / 8)]
    rows += [row(ODD, [1], 0.5, policies={"x": {}}, shard=(0, 2), command=f"kvcompile {ODD}")]
    rows += [row(scores=[2.0, 2.2], losses=True), row("kivi", [2.1, 2.2], 0.28, losses=True)]
    rows += [row("zigzag", [float("nan")] * 2, 0.3, losses=True)]
    return page(board(rows))


class Elements(HTMLParser):
    """Elements of a page in order, (tag, attributes, text inside); raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.all: list[tuple[str, dict[str, Any], list[str]]] = []
        self._open: list[tuple[str, dict[str, Any], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.all.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.all[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag.lower()

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def of(self, tag: str, **attributes: str) -> list[tuple[dict[str, Any], str]]:
        """Attributes and text of the elements that have these attributes."""
        wanted = {name.replace("_", "-").strip("-"): value for name, value in attributes.items()}
        return [(a, "".join(t)) for name, a, t in self.all if name == tag and wanted.items() <= a.items()]


def test_it_is_one_whole_file_that_fetches_nothing() -> None:
    text = html()
    elements = Elements(text.removeprefix("<!doctype html>"))
    ids = [attributes["id"] for _, attributes, _ in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not any({"src", "href", "style"} & set(attributes) for _, attributes, _ in elements.all)
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = (a["content"] for a, _ in elements.of("meta", http_equiv="Content-Security-Policy"))
    for tag in ("style", "script"):
        body = elements.of(tag)[-1][1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_names_are_data_and_numbers_that_json_lacks_are_null() -> None:
    elements = Elements(html().removeprefix("<!doctype html>"))
    ((_, text),) = elements.of("script", type="application/json")
    assert not {"<", ">", "&"} & set(text)  # nothing in it can end its element
    data = json.loads(text)
    stacks = {s["stack"] for panel in data["panels"] for s in panel["standings"]}
    assert stacks == {"dense", "snapkv", "kivi", "adakv", "zigzag", ODD}
    (zigzag,) = (s for panel in data["panels"] for s in panel["standings"] if s["stack"] == "zigzag")
    assert zigzag["score"]["value"] is None
    assert len(elements.of("script")) == 2
    assert not elements.of("img")


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")


def opened(browser: str, path: Path, fragment: str = "") -> Elements:
    """The page as a browser has it after its script."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--window-size=1200,900", f"{path.as_uri()}#{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Elements(done.stdout.removeprefix("<!DOCTYPE html>"))


def groups(elements: Elements) -> Iterator[tuple[str, list[str]]]:
    """Headings of the table's groups, and the stacks below each."""
    for _, _, texts in (e for e in elements.all if e[0] == "tbody"):
        heading, *_ = texts
        yield heading.strip(), [t for t in texts if t in {"dense", "snapkv", "kivi", "adakv", "zigzag", ODD}]


def test_a_browser_sorts_filters_and_draws_what_the_address_says(browser: str, tmp_path: Path) -> None:
    path = tmp_path / "board.html"
    path.write_text(html(), encoding="utf-8")
    shown = opened(browser, path, "task=needle&question=hidden&sort=score&order=descending")
    heading = "SmolLM2-135M, needle, question hidden"
    assert dict(groups(shown)) == {heading: ["dense", ODD, "kivi", "snapkv", "adakv"]}
    assert [(a["data-key"], a["aria-sort"]) for a, _ in shown.of("th", scope="col") if "aria-sort" in a] == [
        ("score", "descending")
    ]
    points = {a["data-stack"]: a for a, _ in shown.of("g") if "data-stack" in a}
    assert set(points) == {"dense", "snapkv", "kivi", "adakv", ODD}
    assert "partial" in points[ODD]["class"]
    assert [a["tabindex"] for a in points.values()].count("0") == 1
    assert [a["aria-label"] for a in points.values() if a["data-stack"] == "kivi"] == [
        "kivi: 88 % (53-98), 28 % (1/3.57) of the bytes"
    ]
    assert {text for _, text in shown.of("text", **{"class": "name"})} == {"snapkv", "kivi", "dense"}
    assert "adakv" in {text for _, text in shown.of("text", **{"class": "name other"})}
    assert not shown.of("img")
    assert shown.of("title")[0][1] == "kvcompile board"
    assert not any("hidden" in a for a, _ in shown.of("details"))  # a shard is missing: that is said
    everything = opened(browser, path, "sort=bytes&order=ascending&stack=KIVI")
    assert dict(groups(everything)) == {heading: ["kivi"], "SmolLM2-135M, perplexity, text read": ["kivi"]}


KEYS = """<script>
  const event = (key) => new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
  const press = (key) => document.activeElement.dispatchEvent(event(key));
  const seen = {};
  document.querySelector("[data-key=contexts] button").click();
  seen.sorted = document.querySelector("[data-key=contexts]").getAttribute("aria-sort");
  document.querySelector(".point[tabindex='0'][data-stack]").focus();
  seen.first = document.querySelector("#card h2").firstChild.textContent;
  press("ArrowRight");
  seen.second = document.activeElement.dataset.stack;
  press("Enter");
  seen.held = document.querySelector("#card").className;
  seen.focus = document.activeElement.textContent;
  seen.command = document.querySelector("#card code").textContent;
  press("Escape");
  seen.closed = document.querySelector("#card").hidden;
  seen.back = document.activeElement.dataset.stack;
  document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


def test_keys_sort_go_from_point_to_point_and_hold_the_command(browser: str, tmp_path: Path) -> None:
    path = tmp_path / "board.html"
    text = html().replace("</body>", KEYS)
    path.write_text(text, encoding="utf-8")
    assert "data-seen" not in opened(browser, path).of("body")[0][0]  # the page's policy runs its own script alone
    path.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text), encoding="utf-8")
    seen = json.loads(opened(browser, path).of("body")[0][0]["data-seen"])
    assert seen == {
        "sorted": "descending",
        "first": "snapkv",
        "second": "adakv",
        "held": "pinned",
        "focus": "Copy the command",
        "command": "kvcompile evaluate=[needle] recipe=adakv",
        "closed": True,
        "back": "adakv",
    }
