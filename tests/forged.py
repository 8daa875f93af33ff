"""What the tests of damaged and forged artifacts share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvcompile
from kvcompile.artifact import manifest
from kvcompile.errors import KvcompileError


def signed(folder: Path, **change: Any) -> None:
    """Make the manifest agree with whatever the files are now, as an attacker would, and say `change` besides."""
    facts = json.loads((folder / "manifest.json").read_text())
    manifest.write(folder, facts["plan"])
    fresh = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**fresh, **change}))


def refused(folder: Path, words: str) -> None:
    """Loading raises one line with these words (a pattern) that names the folder and a fix."""
    with pytest.raises(KvcompileError, match=words) as caught:
        kvcompile.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.fix
