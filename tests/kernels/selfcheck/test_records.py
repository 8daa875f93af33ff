"""Verdicts on disk: what is not whole, not ours or of something else is checked again; one check at a time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernels_to_check import CPU, SPEC, Text, backend

from kvcompile.kernels.selfcheck import identity
from kvcompile.kernels.selfcheck.records import ENDED, remembered, stem
from kvcompile.kernels.selfcheck.verdict import Verdict

RIGHT = Verdict("", 1e-7, 1e-3, 2e-3)
FACTS = {"backend": "toy", "texts": "abc"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    return stem(FACTS).with_suffix(".json")


class Counted:
    """A check that says how often it was made."""

    def __init__(self, verdict: Verdict = RIGHT) -> None:
        self.verdict, self.calls = verdict, 0

    def __call__(self) -> Verdict:
        self.calls += 1
        return self.verdict


def test_a_verdict_is_found_once(place: Path) -> None:
    check = Counted()
    assert [remembered(FACTS, check) for _ in range(3)] == [RIGHT] * 3
    assert check.calls == 1
    assert place.stat().st_mode & 0o077 == 0
    assert remembered({**FACTS, "texts": "abd"}, check) == RIGHT
    assert check.calls == 2, "another text, another verdict"
    remembered(FACTS, check, again=True)
    assert check.calls == 3
    assert not list(place.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "verdict", [Verdict("differs", float("inf")), Verdict("fails", float("nan")), Verdict("x", 1.0)]
)
def test_whatever_a_check_says_can_be_read_again(verdict: Verdict) -> None:
    remembered(FACTS, lambda: verdict)
    assert repr(remembered(FACTS, Counted())) == repr(verdict)


POISONS = [
    "cut off",
    "empty",
    "no JSON",
    "a list",
    "deep",
    "of another version",
    "of no identity",
    "of another form",
    "of half a form",
    "of other types",
    "of no verdict",
]


def poisoned(place: Path) -> dict[str, str]:
    """By what is wrong with it, a file that says that a kernel is right."""
    good = json.loads(place.read_text("utf-8"))
    verdict = good["verdict"]
    return {
        "cut off": json.dumps(good)[:-30],
        "empty": "",
        "no JSON": "yes",
        "a list": "[]",
        "deep": "[" * 100_000,
        "of another version": json.dumps({**good, "identity": {**FACTS, "kvcompile": "0.0.1"}}),
        "of no identity": json.dumps({"verdict": verdict}),
        "of another form": json.dumps({**good, "verdict": {**verdict, "trusted": True}}),
        "of half a form": json.dumps({**good, "verdict": {"problem": ""}}),
        "of other types": json.dumps({**good, "verdict": {**verdict, "kernel": "fast"}}),
        "of no verdict": json.dumps({**good, "verdict": None}),
    }


@pytest.mark.parametrize("how", POISONS)
def test_what_is_poisoned_is_checked_again(how: str, place: Path) -> None:
    remembered(FACTS, Counted())
    place.write_text(poisoned(place)[how], "utf-8")
    check = Counted(Verdict("differs"))
    assert remembered(FACTS, check).problem == "differs"
    assert check.calls == 1
    assert remembered(FACTS, Counted()).problem == "differs", "mended"


def test_bytes_that_are_no_text_are_checked_again(place: Path) -> None:
    remembered(FACTS, Counted())
    place.write_bytes(b"\xff\xfe\x00")
    check = Counted()
    remembered(FACTS, check)
    assert check.calls == 1


@pytest.mark.skipif(os.name != "posix", reason="no such permissions")
def test_what_others_can_write_is_not_believed(place: Path) -> None:
    remembered(FACTS, Counted())
    place.chmod(0o666)
    check = Counted(Verdict("differs"))
    assert remembered(FACTS, check).problem == "differs"


def test_a_check_that_is_interrupted_leaves_nothing(place: Path) -> None:
    def interrupted() -> Verdict:
        assert "process" in json.loads(place.read_text("utf-8"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remembered(FACTS, interrupted)
    assert not place.exists()
    assert remembered(FACTS, Counted()) == RIGHT


DIES = """
import json, os, sys
from kvcompile.kernels.selfcheck.records import remembered
remembered(json.loads(sys.argv[1]), lambda: os._exit(139))
"""


@pytest.mark.skipif(os.name != "posix", reason="whether a process is gone is asked on POSIX alone")
def test_a_kernel_that_takes_its_process_along_is_tried_once(place: Path) -> None:
    child = subprocess.run([sys.executable, "-c", DIES, json.dumps(FACTS)], check=False, timeout=120)
    assert child.returncode == 139
    check = Counted()
    assert remembered(FACTS, check) == Verdict(ENDED)
    assert remembered(FACTS, check) == Verdict(ENDED)
    assert check.calls == 0
    assert remembered(FACTS, check, again=True) == RIGHT
    assert remembered(FACTS, check) == RIGHT


def test_a_mark_of_a_process_that_lives_or_of_another_machine_says_nothing(place: Path) -> None:
    for process, machine in ((os.getppid(), platform.node()), (2**22 + 1, "elsewhere"), (None, None)):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"identity": FACTS, "process": process, "machine": machine}), "utf-8")
        assert remembered(FACTS, Counted()) == RIGHT


CHILD = """
import sys, time
from pathlib import Path
from kvcompile.kernels.selfcheck.records import remembered
from kvcompile.kernels.selfcheck.verdict import Verdict

def check():
    with open(sys.argv[1], "a") as log:
        log.write("checked\\n")
    time.sleep(1.0)
    return Verdict("", 1e-7, 1e-3, 2e-3)

print(remembered({"backend": "toy", "texts": "abc"}, check).taken)
"""


def test_two_processes_at_once_check_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=100)[0] for child in children]
    assert said == ["True\n"] * 2
    assert log.read_text("utf-8") == "checked\n"


def test_where_nothing_can_be_written_each_process_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", "utf-8")
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="verdicts on kernels cannot be kept in"):
        assert remembered(FACTS, Counted()) == RIGHT


def test_an_identity_is_of_text_device_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of these changes, kernels are checked again."""

    def now(text: str = "a text", spec=SPEC, dtype: torch.dtype = torch.float32, sources: Text | None = None) -> str:
        return identity.digest(identity.identity(backend(text=text), spec, dtype, CPU))

    seen = [now(), now("another text"), now(spec=replace(SPEC, scale=0.3)), now(dtype=torch.float16)]
    monkeypatch.setattr(identity, "driver", lambda device: "a newer driver")
    seen.append(now())
    monkeypatch.setattr(identity, "device_name", lambda device: "another device")
    seen.append(now())
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "99"})
    seen.append(now())
    assert len(set(seen)) == len(seen)
    assert now() == seen[-1], "the same twice"
    facts = identity.identity(backend(), SPEC, torch.float32, CPU)
    assert all(isinstance(value, str) and value for value in facts.values())
