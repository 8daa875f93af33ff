"""How long work reports how far it is: a callable, and the bar on the terminal that is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""(what, done, total); total 0: not known ahead."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `Progress` that draws one rich bar per task on the terminal."""
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield show


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Hold back transformers' own bars, which would fight with ours for the line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
