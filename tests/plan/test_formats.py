"""Number formats: the table of NormalFloat4, facts by name, and those of other packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.plan import extensions, formats
from kvcompile.plan.formats import Integer, NumberFormat, number_format
from kvcompile.plan.storage import Codec

# QLoRA, arXiv 2305.14314, appendix E
PRINTED = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def these(**targets: Any) -> None:
        entries = [SimpleNamespace(name=n, value=f"elsewhere:{n}", load=load) for n, load in targets.items()]
        monkeypatch.setattr(extensions, "entry_points", lambda group: entries if group == "kvcompile.formats" else [])
        formats.installed.cache_clear()

    yield these
    formats.installed.cache_clear()


def test_levels_of_nf4_are_those_that_the_paper_prints() -> None:
    assert formats.normal_float() == pytest.approx(PRINTED, abs=3e-7)  # printed in float32
    assert formats.normal_float()[7] == 0.0


def test_facts_are_known_without_torch() -> None:
    """Per token of 64 channels: 4 bits each and one float16 for every 32."""
    count = "from kvcompile.plan.storage import Codec; print(Codec('nf4', 'token', 32).nbytes(10, 64))"
    code = f"import sys; {count}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(10 * (32 + 2 * 2)), "False"]


def test_a_format_of_another_package_stands_beside_those_here(install: Any) -> None:
    six = Integer("six8", 8)
    install(six8=lambda: six)
    assert number_format("six8") is six
    assert Codec("six8", "token").nbytes(3, 16) == 3 * (16 + 4)


def broken() -> None:
    raise ImportError("no such module")


@pytest.mark.parametrize(
    ("name", "load", "message"),
    [
        ("gone", broken, "'elsewhere:gone' of another package does not load, got no such module"),
        ("odd", lambda: 3, "entry point 'odd' of kvcompile.formats must be a NumberFormat of that name"),
        ("odd", lambda: Integer("even", 4), "must be a NumberFormat of that name"),
        ("int4", lambda: Integer("int4", 4), "'int4' is there twice"),
    ],
)
def test_entry_points_that_are_no_format_are_refused(install: Any, name: str, load: Any, message: str) -> None:
    install(**{name: load})
    with pytest.raises(KvcompileError, match=message):
        number_format("another")


@pytest.mark.parametrize(("bits", "dtype"), [(3, "uint8"), (4, "float32"), (12, "int16"), (0, "uint8")])
def test_codes_that_cannot_be_stored_are_refused(bits: int, dtype: str) -> None:
    with pytest.raises(KvcompileError, match="codes must be whole bytes, or 1, 2 or 4 bits"):
        NumberFormat("odd", bits, dtype)
