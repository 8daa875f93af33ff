"""A stack that a search tries: policies and fields, as a recipe, as a command line and as a plan's policies."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.compare.entry import FULL, Entry
from kvcompile.stack import build_stack, policy_class

if TYPE_CHECKING:
    from kvcompile.plan.policy import Policy

FIT = "fit"  # stands for a budget that is solved, not drawn
Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stack:
    """Policies in order, each with the fields that are not left at their defaults."""

    options: Options

    @property
    def fits(self) -> bool:
        """Whether a budget of it is left to be solved."""
        return any(value == FIT for fields in self.options.values() for value in fields.values())

    def filled(self, budget: float) -> Stack:
        """The stack with a budget in each place that is left to be solved."""
        return Stack(
            {
                name: {key: budget if value == FIT else value for key, value in fields.items()}
                for name, fields in self.options.items()
            }
        )

    def policies(self) -> tuple[Policy, ...]:
        """The policies. Raises KvcompileError for values out of range and an order that cannot be."""
        return build_stack(list(self.options), self.options)

    @property
    def overrides(self) -> tuple[str, ...]:
        """The stack as on the command line; nothing for the model as it is."""
        if not self.options:
            return ()
        fields = [f"stack.{name}.{key}={shown(v)}" for name, o in self.plain().items() for key, v in o.items()]
        return (f"policy=[{','.join(self.options)}]", *fields)

    @property
    def entry(self) -> Entry:
        """As a contest knows it."""
        return Entry(" ".join(self.overrides) or FULL)

    def plain(self) -> dict[str, dict[str, Any]]:
        """As data: what differs from the defaults."""
        return {
            name: {key: value for key, value in fields.items() if value != default(name, key)}
            for name, fields in self.options.items()
        }


DENSE = Stack({})


def default(policy: str, name: str) -> Any:
    """What a field of a policy is where nothing says otherwise; `MISSING` where something must."""
    spec = next(f for f in dataclasses.fields(policy_class(policy)) if f.name == name)
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def shown(value: Any) -> str:
    """A value in the grammar of the command line, without spaces."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else '"{}"'.format(value.replace('"', '\\"'))
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
