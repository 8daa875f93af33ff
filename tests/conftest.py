from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # how long an example takes says how busy a machine is
settings.load_profile("unhurried")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out: `from tiny import tiny_model`


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """Folder of the default model; never fetched by a test."""
    from kvcompile.models.default import default_folder

    folder = default_folder()
    if not (folder / "manifest.json").exists():
        pytest.skip(f"the default model is not in {folder}: python -m kvcompile.models.default fetches it")
    return folder
