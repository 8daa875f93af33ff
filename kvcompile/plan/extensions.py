"""Things by name: ours, and what other packages bring by their entry points: policies, formats, backends, tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from kvcompile.errors import KvcompileError
from kvcompile.options import suggest

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


def imported(places: Mapping[str, str]) -> dict[str, Any]:
    """Classes by name, of places as `package.module:Class`."""
    parts = {name: place.partition(":") for name, place in places.items()}
    return {name: getattr(import_module(module), cls) for name, (module, _, cls) in parts.items()}


def named(what: str, name: str, known: Mapping[str, T]) -> T:
    """The one of this name. Raises KvcompileError with the nearest name and the list of all."""
    if name not in known:
        raise KvcompileError(f"unknown {what}", repr(name), suggest(name, known))
    return known[name]


def is_a(base: Any) -> Callable[[Any, str], bool]:
    """Whether something is a subclass of `base` that calls itself by a name, for `with_extensions`."""
    return lambda loaded, name: isinstance(loaded, type) and issubclass(loaded, base) and loaded.name == name  # type: ignore[attr-defined]
