"""Bars: ours alone, and whatever was shown before is shown again."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from kvcompile.progress import no_foreign_bars


@pytest.mark.parametrize("shown", [True, False])
def test_foreign_bars_come_back_as_they_were(shown: bool) -> None:
    switch = logging.enable_progress_bar if shown else logging.disable_progress_bar
    before = logging.is_progress_bar_enabled()
    try:
        switch()
        with no_foreign_bars():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
