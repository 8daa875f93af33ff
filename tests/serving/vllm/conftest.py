from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The served folder of a policy by its name, or of `whole`, a budget of everything; each is written once.

    KVCOMPILE_SERVED_FOLDERS names a place where they stay for another run.
    """
    import vllm_engine as vllm

    vllm.require_model()
    kept = os.environ.get("KVCOMPILE_SERVED_FOLDERS")
    place = Path(kept) if kept else tmp_path_factory.mktemp("served")

    def folder(name: str) -> Path:
        path = place / name
        return path if path.is_dir() else vllm.export(vllm.POLICIES.get(name, vllm.WHOLE), path)

    return folder
