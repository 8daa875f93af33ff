"""The two ways a program holds its cache, as modules that `torch.export` takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.errors import KvcompileError, first_line
from kvcompile.exporters.static.cache import State
from kvcompile.exporters.static.lower import Program

LEAST = 2  # tokens of a prompt: a dimension that may be 1 is another program to torch.export


class _Buffers(nn.Module):
    """A state as buffers of one module."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name, tensor)


class Resident(nn.Module):
    """Base of the programs that own their cache: its tensors are buffers `cache.<name>`, empty when saved."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.cache = _Buffers(program.empty())


class ResidentPrefill(Resident):
    """`input_ids [B, T]` to logits `[B, 1, vocabulary]`; whatever the cache held is replaced."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits after the prompt."""
        logits, state = self.program.prefill(input_ids)
        for name, buffer in self.cache.named_buffers():
            buffer.copy_(state[name])
        return logits


class ResidentDecode(Resident):
    """`input_ids [B, 1]` to logits `[B, 1, vocabulary]`; the token is added to the cache."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits after one more token."""
        return self.program.decode(input_ids, dict(self.cache.named_buffers()))


class Handed(nn.Module):
    """Base of the programs whose cache the caller keeps."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.names = program, list(program.empty())


class HandedPrefill(Handed):
    """`input_ids [B, T]` to `(logits [B, 1, vocabulary], *cache)`, every tensor of the cache in memory of its own."""

    nothing: Tensor

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.register_buffer("nothing", torch.zeros(len(self.names), dtype=torch.int32, device=program.device))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Logits after the prompt, and the cache."""
        logits, state = self.program.prefill(input_ids)
        return (logits, *(self._apart(i, state[name]) for i, name in enumerate(self.names)))

    def _apart(self, i: int, x: Tensor) -> Tensor:
        """`x`, for a compiler another number than any layer's.

        Entries and positions of layers that keep the same tokens are equal; it would make one tensor of them, which a
        decode then changes once for each layer.
        """
        return x if x.is_floating_point() else x + self.nothing[i].to(x.dtype)


class HandedDecode(Handed):
    """`input_ids [B, 1], *cache` to logits `[B, 1, vocabulary]`; the cache's tensors are changed in place."""

    def forward(self, input_ids: Tensor, *cache: Tensor) -> Tensor:
        """Logits after one more token."""
        return self.program.decode(input_ids, dict(zip(self.names, cache, strict=True)))


# prefill and decode, by who holds their cache
MODULES: Mapping[str, tuple[Callable[[Program], nn.Module], Callable[[Program], nn.Module]]] = {
    "resident": (ResidentPrefill, ResidentDecode),
    "handed": (HandedPrefill, HandedDecode),
}


def exported(module: nn.Module, program: Program) -> torch.export.ExportedProgram:
    """The traced module: a decode program for one token, a prefill program for `LEAST` to `limits.prompt` tokens.

    Raises KvcompileError where the model itself cannot be traced.
    """
    limits = program.limits
    decoding = isinstance(module, ResidentDecode | HandedDecode)
    count = 1 if decoding else min(limits.prompt, 2 * LEAST + 3)
    ids = torch.zeros(limits.batch, count, dtype=torch.int64, device=program.device)
    one = decoding or limits.prompt == LEAST
    shapes = None if one else ({1: torch.export.Dim("tokens", min=LEAST, max=limits.prompt)},)
    cache = program.empty().values() if isinstance(module, HandedDecode) else ()
    with traceable(module):
        return torch.export.export(module, (ids, *cache), dynamic_shapes=shapes, strict=False)


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients while `module` is traced; what goes wrong becomes one line.

    Raises KvcompileError.
    """
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of their own deprecated calls
            yield
    except KvcompileError:
        raise
    except Exception as error:  # the exporters raise whatever the model's own code does under a trace
        raise KvcompileError(
            "the model's own layers must be traceable",
            f"{type(error).__name__}: {first_line(error)}",
            "another release of torch, or the artifact alone, which kvcompile runs untraced",
        ) from error
    finally:
        for m, mode in modes:
            m.training = mode


def described(program: Program) -> dict[str, Any]:
    """What a caller must know of the programs: limits, cache tensors, and the room of every layer."""
    limits, state = program.limits, program.empty()
    return {
        "batch": limits.batch,
        "prompt": [LEAST, limits.prompt],
        "new": limits.new,
        "dtype": program.plan.dtype,
        "cache": [
            {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
            for name, x in state.items()
        ],
        "cache_bytes": sum(x.numel() * x.element_size() for x in state.values()),
        "layers": [
            {
                "layer": room.plan.index,
                "capacity": room.capacity,
                "kept": list(room.kept[limits.prompt]) if room.kept else None,
                "mean": room.budgets[limits.prompt] if room.budgets else None,
                "shared": room.shared,
                "every": room.every,
                "ring": room.ring,
                "readers": [p.index for p in program.plan.layers if p.owner == room.plan.index],
            }
            for room in program.rooms
        ],
    }
