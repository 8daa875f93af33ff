"""A recipe as analyses name it: `full`, `snapkv budget=0.1`, `policy=[snapkv,kivi] budget=0.2`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from kvcompile.config.schema import Config

Question = Literal["seen", "hidden"]
FULL = "full"
SETTINGS = ("recipe", "policy", "stack", "budget", "prefill_chunk", "heal")


@dataclass(frozen=True)
class Entry:
    """A recipe's name, or `full` for the model as it is, and settings as on the command line, one space between two.

    Raises KvcompileError for a setting of something else than a recipe.
    """

    text: str

    def __post_init__(self) -> None:
        for word in self.overrides:
            if word.partition("=")[0].partition(".")[0] not in SETTINGS:
                raise KvcompileError(
                    "a recipe to compare is a name or `full`, and settings of recipes",
                    repr(self.text),
                    f"settings begin with {', '.join(SETTINGS)}",
                )

    @property
    def overrides(self) -> tuple[str, ...]:
        """The command line of this recipe."""
        first, *more = self.text.split() or [""]
        if first == FULL:
            return tuple(more)
        return (first if "=" in first else f"recipe={first}", *more)

    @property
    def fixed(self) -> bool:
        """Whether it is the model as it is."""
        return not self.overrides

    def within(self, budget: float) -> Entry:
        """The recipe with a budget."""
        return Entry(f"{self.text} budget={budget:g}")

    def config(self, kernels: str = "auto") -> Config:
        """Its config. Raises KvcompileError for what does not compose."""
        return _composed(f"kernels={kernels}", *self.overrides)


@cache  # Hydra takes half a second
def _composed(*overrides: str) -> Config:
    from kvcompile.config.compose import compose

    return compose(overrides)
