"""Kernels for a GPU that is not here: compiled ahead of time, with what they take of it.

Works where Triton is imported for compiling: not in a process that runs the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcompile.kernels.choose import ChooseSpec
from kvcompile.kernels.compact import CompactSpec
from kvcompile.kernels.reference.ghost import GhostSpec
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton.entries import choose, compact, ghost
from kvcompile.kernels.triton.forms import Form, power_of_two
from kvcompile.kernels.triton.launch import kernels
from kvcompile.kernels.triton.parts import Argument
from kvcompile.kernels.triton.tuning import Choice, default

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory one program may use. Triton compiles past them without a word. NVIDIA: CUDA C++ Programming
# Guide, technical specifications per compute capability (opt-in maximum a block); AMD: 64 KiB LDS a compute unit.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"float32": ("*fp32", tl.float32), "float16": ("*fp16", tl.float16), "bfloat16": ("*bf16", tl.bfloat16)}
MERGE = [("mid", "*fp32"), ("lse", "*fp32"), ("out", "*q"), ("merged", "*fp32"), ("count", "i32")]


@dataclass(frozen=True)
class Compiled:
    """Registers a thread, bytes spilled a thread, bytes of shared memory a program, and the device code."""

    registers: int
    spilled: int
    shared: int
    binary: bytes


def compile_kernel(
    function: Any, arguments: list[Argument], fixed: dict[str, Any], dtype: str, target: str, choice: Choice
) -> Compiled:
    """One kernel for one target; pointers and aligned numbers are taken as multiples of 16, as they are at a launch."""
    queries = DTYPES[dtype][0]
    signature = {a.name: queries if a.type == "*q" else a.type for a in arguments}
    at = {name: i for i, name in enumerate(function.arg_names)}
    aligned = {(at[a.name],): [["tt.divisibility", 16]] for a in arguments if a.type != "constexpr" and a.aligned}
    source = ASTSource(function, signature, fixed, aligned)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    options = {"num_warps": choice.warps, "num_stages": choice.stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{n}:\s+(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        return Compiled(registers, spilled * 4, compiled.metadata.shared, compiled.asm["hsaco"])
    registers, spilled = _cuda_usage(compiled.asm["cubin"])
    return Compiled(registers, spilled, compiled.metadata.shared, compiled.asm["cubin"])


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if usage is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {done.stdout}")
    return int(usage[1]), int(usage[2])


def compile_compact(spec: CompactSpec, target: str) -> Compiled:
    """The compaction kernel of a spec."""
    generated, module = compact.compaction(spec)
    return compile_kernel(module.compact, generated.arguments, {}, "float16", target, compact.CHOICE)


def compile_choose(spec: ChooseSpec, target: str) -> Compiled:
    """The kernel that scores the groups of a spec."""
    generated, module = choose.scoring(spec)
    return compile_kernel(module.score, generated.arguments, {}, spec.dtype, target, choose.CHOICE)


def compile_ghost(spec: GhostSpec, target: str) -> dict[str, Compiled]:
    """The kernels of ghost scores, by name."""
    generated, module = ghost.kernels(spec)
    fixed = {"DOT": DTYPES[spec.dtype][1]}
    return {
        name: compile_kernel(getattr(module, name), arguments, fixed, spec.dtype, target, ghost.CHOICE)
        for name, arguments in generated.arguments.items()
    }


def compile_spec(
    spec: KernelSpec,
    tokens: str,
    target: str,
    dtype: str = "float16",
    choice: Choice | None = None,
    work: str = "attend",
) -> dict[str, Compiled]:
    """Every kernel of a spec, by name: with one new token the split ones, with many those of one program a row."""
    choice = choice or default(spec, tokens)
    form = Form(tokens, choice.rows, choice.tile, tokens == "one", work)
    generated, module = kernels(spec, form)
    wide = any(c.kind == "float32" for p in spec.parts for c in (p.key, p.value))
    dot = tl.float32 if wide else DTYPES[dtype][1]
    types = {"DOT": dot, "CODE": tl.float32 if dot == tl.float32 else tl.float16, "SPLITS": 8}
    compiled = {}
    for name, arguments in generated.arguments.items():
        fixed = {a.name: types[a.name] for a in arguments if a.type == "constexpr"}
        compiled[name] = compile_kernel(getattr(module, name), arguments, fixed, dtype, target, choice)
    if form.split:
        sizes = {"G": spec.group, "DIM": spec.value_dim, "WIDE": power_of_two(spec.value_dim), "SPLITS": 8}
        arguments = [Argument(n, t, n != "count") for n, t in MERGE] + [Argument(n, "constexpr") for n in sizes]
        compiled["merge"] = compile_kernel(module.merge, arguments, sizes, dtype, target, Choice(0, 0, 4, 2))
    return compiled
