"""What an attention kernel must know ahead of time: a layout and a shape, never a policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpec:
    """One specialised attention kernel: everything here may be compiled in, everything else is an argument."""

    layout: str  # dense | ragged
    key_type: str  # float32 | float16 | bfloat16
    value_type: str
    group: int  # query heads per KV head
    head_dim: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def name(self) -> str:
        """Readable and unique up to `scale`: `dense-float32-g3-d64`."""
        kinds = self.key_type if self.key_type == self.value_type else f"{self.key_type}_{self.value_type}"
        extras = [f"-w{self.sliding_window}"] if self.sliding_window else []
        extras += [f"-cap{self.softcap:g}"] if self.softcap else []
        return f"{self.layout}-{kinds}-g{self.group}-d{self.head_dim}" + "".join(extras)
