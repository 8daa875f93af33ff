"""Where kvcompile keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KVCOMPILE_CACHE, else kvcompile/ in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KVCOMPILE_CACHE") or Path(cache, "kvcompile")).expanduser()
