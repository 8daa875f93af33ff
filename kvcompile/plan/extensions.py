"""What other packages bring, found by their entry points: policies, formats, backends, architectures, analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from kvcompile.errors import KvcompileError

T = TypeVar("T")


def with_extensions(
    group: str, what: str, ours: Mapping[str, T], kind: str = "", is_one: Callable[[Any, str], bool] | None = None
) -> dict[str, T]:
    """`ours` by name, then what the entry points of a group name.

    Args:
        group: of entry points, `kvcompile.policies`.
        what: one of them in a message, `policy`.
        ours: those that are taken.
        kind: what each must be, `a Policy`.
        is_one: whether what was loaded is one, and of that name; None: the caller looks.

    Raises KvcompileError if an entry point cannot be loaded, is none of the kind, or takes a name that is taken.
    """
    found = dict(ours)
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        try:
            loaded = entry.load()
        except Exception as error:
            raise KvcompileError(
                f"the {what} {entry.value!r} of another package does not load", error, "mend or remove it"
            ) from error
        if is_one is not None and not is_one(loaded, entry.name):
            raise KvcompileError(f"entry point {entry.name!r} of {group} must be {kind} of that name", entry.value)
        if found.setdefault(entry.name, loaded) is not loaded:
            got = f"{entry.value} and {found[entry.name]}"
            raise KvcompileError(f"{what} {entry.name!r} is there twice", got, "rename or remove one of the two")
    return found
