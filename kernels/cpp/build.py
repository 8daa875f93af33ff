"""Generated C++ to a loaded library: the system compiler, a cache on disk, and the threads that torch already runs.

A library is compiled with OpenMP but linked to the runtime that torch has loaded in this process, so that there is
one pool of threads. Two pools would spin against each other at every kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvcompile.atomic import making
from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import library, simd
from kvcompile.paths import make_private, private_folder

COMPILERS = ("c++", "g++", "clang++")
LANGUAGE = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
REFUSED = ("-Winvalid-pch", "-Werror=invalid-pch")  # a header that GCC passes over is an error
WARNINGS = ("-Wall", "-Wno-psabi", "-Wno-unknown-pragmas")
FIX = "install g++ or clang++ (or name one in $CXX), or set kernels=sdpa"
COMPILE_SECONDS, ANSWER_SECONDS = 300.0, 60.0  # until a compiler counts as hanging: at a kernel, at a question
PROBE = """\
extern "C" int probe(int threads) {
  int seen = 0;
#pragma omp parallel num_threads(threads) reduction(+ : seen)
  seen += 1;
  return seen;
}
"""

_lock = threading.Lock()
_building: dict[str, threading.Lock] = {}
_loaded: dict[str, ctypes.CDLL] = {}
_headers: dict[str, bool] = {}  # of each parsed header, whether the compiler takes it


@dataclass(frozen=True)
class OpenMP:
    """How to compile for and link to the OpenMP runtime of this process."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    runtime: str


@dataclass(frozen=True)
class Toolchain:
    """A compiler that works, how it is called, and what it builds for.

    `macros` are all those it predefines under `flags`: its identity and version and the features of this CPU.
    `openmp` is None where kernels run on one thread; `note` says why.
    """

    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    macros: str
    openmp: OpenMP | None
    note: str

    @property
    def simd(self) -> str:
        """The vectors that `simd.h` uses under these flags, the same choice as there."""
        defined = set(re.findall(r"^#define (\w+)", self.macros, re.M))
        if defined >= {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"}:
            return "AVX-512"
        if defined >= {"__AVX2__", "__FMA__", "__F16C__"}:
            return "AVX2"
        return "NEON" if "__ARM_NEON" in defined and "__aarch64__" in defined else "portable vectors"


def available() -> str | None:
    """None where C++ kernels can be built here, else the reason why not."""
    outcome = _toolchain(os.environ.get("CXX", ""), os.environ.get("PATH", ""), str(folder()))
    return None if isinstance(outcome, Toolchain) else outcome


def toolchain() -> Toolchain:
    """The compiler that `load` uses. Raises KvcompileError where none works."""
    outcome = _toolchain(os.environ.get("CXX", ""), os.environ.get("PATH", ""), str(folder()))
    if isinstance(outcome, str):
        raise KvcompileError("C++ kernels must be built on this machine", outcome, FIX)
    return outcome


def describe() -> str:
    """One line for reports: compiler, vectors, flags, threads. Raises KvcompileError where no compiler works."""
    tools = toolchain()
    threads = f"OpenMP ({Path(tools.openmp.runtime).name})" if tools.openmp else f"one thread ({tools.note})"
    return f"{tools.version}; {tools.simd}; {' '.join(tools.flags)}; {threads}"


def folder() -> Path:
    """Where libraries and, beside them, their sources lie: nobody else can write there."""
    return private_folder("kernels")


def load(source: str, name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of a C++ source text, compiled at most once per compiler, flags and kind of CPU.

    name: what the files in the cache are called, before the hash; flags: added at the end of the command.
    Threads and processes may ask for the same source at once: one of them compiles.
    Raises KvcompileError where there is no compiler, the source does not compile or the cache cannot be written.
    """
    return _load(toolchain(), source, name, flags)


def _load(tools: Toolchain, source: str, name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    link = tools.openmp.link if tools.openmp else ()
    stem = folder() / f"{name}-{_hash(source, *tools.compiler, *tools.flags, *flags, tools.macros, *link)}"
    with _lock:
        if loaded := _loaded.get(str(stem)):
            return loaded
        lock = _building.setdefault(str(stem), threading.Lock())
    with lock:
        if str(stem) not in _loaded:
            try:
                _loaded[str(stem)] = _compiled(tools, source, stem, flags)
            except OSError as problem:
                raise KvcompileError(
                    "compiled kernels are kept in a folder that can be written and run from",
                    f"{folder()}: {problem}",
                    "set KVCOMPILE_CACHE=<folder>, or kernels=sdpa",
                ) from problem
        return _loaded[str(stem)]


def _compiled(tools: Toolchain, source: str, stem: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    built, text = stem.with_name(f"{stem.name}.so"), stem.with_name(f"{stem.name}.cpp")
    if opened := library.opened(built):
        return opened
    make_private(stem.parent)
    with library.alone(text):
        if opened := library.opened(built):  # another process built it while we waited
            return opened
        text.write_text(source, "utf-8")  # to read: where locks do not work another process may be writing it too
        with making(built, ".making-") as scratch:
            written = scratch / text.name
            written.write_text(source, "utf-8")
            _compile(tools, written, text, flags, source.startswith(simd.prelude()))
            library.publish(written.with_suffix(".so"), built)
    return ctypes.CDLL(str(built))


def _compile(tools: Toolchain, text: Path, shown: Path, flags: tuple[str, ...], vectors: bool) -> None:
    """Compile and link apart: given -fopenmp, a linker would take the compiler's own runtime, not torch's.

    shown: the file that an error names, which stays; vectors: whether the text begins with those of `simd`.
    """
    command = [*tools.compiler, *tools.flags, *WARNINGS, *flags]
    threads, link = (tools.openmp.compile, tools.openmp.link) if tools.openmp else ((), ())
    compiled, linked = text.with_suffix(".o"), text.with_suffix(".so")
    parse = [*command, *threads]
    header = _header(tools, parse, shown.parent) if vectors else None
    to_object = ["-c", str(text), "-o", str(compiled)]
    try:
        _run([*parse, *(["-include", str(header), *REFUSED] if header else []), *to_object], compiled, shown)
    except KvcompileError as error:
        if header is None or isinstance(error.__cause__, subprocess.TimeoutExpired):
            raise
        _run([*parse, *to_object], compiled, shown)  # where that works, it was the header
        _headers[str(header)] = False
    _run([*command, "-shared", str(compiled), "-o", str(linked), *link], linked, shown)


def _header(tools: Toolchain, command: list[str], kept: Path) -> Path | None:
    """The vectors as a header that this compiler has parsed under this command; None where it makes or takes none.

    To parse them (with the intrinsics of the system) takes longer than to compile most kernels.
    """
    if "__clang__" in tools.macros:
        return None
    header = kept / f"vectors-{_hash(simd.header(), *command, tools.version, tools.macros)}.h"
    with _lock:
        lock = _building.setdefault(str(header), threading.Lock())
    with lock:
        if str(header) not in _headers:
            _headers[str(header)] = _parsed(command, header)
        return header if _headers[str(header)] else None


def _parsed(command: list[str], header: Path) -> bool:
    """Have the compiler parse the vectors into the file beside `header` that it looks for; whether it could."""
    built = header.with_name(f"{header.name}.gch")
    if library.whole(built):
        return True
    with library.alone(header):
        if library.whole(built):
            return True
        header.write_text(simd.header(), "utf-8")
        with making(built, ".making-") as scratch:
            written, made = scratch / header.name, scratch / built.name
            written.write_text(simd.header(), "utf-8")
            try:
                _run([*command, "-x", "c++-header", str(written), "-o", str(made)], made, header)
            except KvcompileError:
                return False
            library.publish(made, built)
    return True


def _hash(*identity: str) -> str:
    return hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:20]


def _run(command: list[str], result: Path, shown: Path) -> None:
    try:
        done = _said(command, COMPILE_SECONDS)
    except OSError as error:
        raise KvcompileError("the compiler must run", error, FIX) from error
    except subprocess.TimeoutExpired as error:
        raise KvcompileError(
            f"a compiler must be done with a kernel in {COMPILE_SECONDS:.0f} s",
            f"{Path(command[0]).name}, still at {shown}, was stopped",
            FIX,
        ) from error
    if done.returncode == 0 and result.is_file():
        return
    said = done.stderr.replace(str(result.with_suffix(".cpp")), str(shown))
    lines = [line for line in said.splitlines() if line.strip()]
    lines = lines or [f"exit status {done.returncode}" if done.returncode else f"{command[0]} wrote no {result.suffix}"]
    first = next((line for line in lines if "error" in line), lines[-1]).strip()
    where = "" if str(shown) in first else f" from {shown}"
    raise KvcompileError("the compiler must accept a generated kernel", first + where, "set kernels=sdpa")


def _said(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """What a command wrote, in English; it and all that it started are ended where it takes longer or we are stopped.

    Raises OSError where it cannot be run, TimeoutExpired.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "env": {**os.environ, "LC_ALL": "C"}}
    with subprocess.Popen(command, start_new_session=True, **pipes, **text) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@lru_cache(maxsize=8)
def _toolchain(named: str, path: str, place: str) -> Toolchain | str:
    """The first compiler that builds and loads a probe, or why none does; cached by what the choice depends on."""
    if sys.platform == "win32":
        return "kernels are not built on Windows"
    wanted = [named] if named.strip() else list(COMPILERS)
    reasons = []
    for candidate in wanted:
        try:
            program, *options = shlex.split(candidate)
        except ValueError as error:  # a quotation mark alone
            return f"$CXX={candidate} is no command: {error}"
        where = shutil.which(program, path=path)
        if where is None:
            continue
        try:
            outcome = _try((where, *options))
        except subprocess.TimeoutExpired:
            outcome = f"no answer in {ANSWER_SECONDS:.0f} s"
        if isinstance(outcome, Toolchain):
            return outcome
        reasons.append(f"{candidate}: {outcome}")
    return "; ".join(reasons) or f"no {' or '.join(wanted)} on the path"


def _try(compiler: tuple[str, ...]) -> Toolchain | str:
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    for flags in ((*LANGUAGE, native), LANGUAGE):
        macros = _output([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        if "__cplusplus" in macros:
            break
    else:
        return "it preprocesses no C++17"
    version = (_output([*compiler, "--version"]) or compiler[0]).splitlines()[0]
    openmp, note = _openmp("__clang__" in macros)
    threaded = Toolchain(compiler, version, flags, macros, openmp, note)
    single = Toolchain(compiler, version, flags, macros, None, note or "it builds nothing with OpenMP")
    problem = ""
    for tools in (threaded, single):
        try:
            _load(tools, PROBE, "probe")
        except KvcompileError as error:
            problem = str(error.got)
        else:
            return tools
    return problem


def _output(command: list[str]) -> str:
    try:
        done = _said(command, ANSWER_SECONDS)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def _openmp(clang: bool) -> tuple[OpenMP | None, str]:
    """Flags for the runtime that torch has loaded, or None and why not.

    GCC calls libgomp's entry points, which LLVM's and Intel's runtimes offer too; Clang calls LLVM's alone.
    """
    runtime = _runtime()
    if runtime is None:
        return None, "torch has loaded no OpenMP runtime"
    if clang and "gomp" in runtime.name:
        return None, f"clang cannot use torch's {runtime.name}, g++ can"
    # Apple's driver knows no -fopenmp, but hands it on
    compile = ("-Xpreprocessor", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
    return OpenMP(compile, (str(runtime), f"-Wl,-rpath,{runtime.parent}"), str(runtime)), ""


def _runtime() -> Path | None:
    """The file of the OpenMP runtime in this process, the one in torch's own folder first."""
    home = Path(torch.__file__).resolve().parent
    runtimes: list[Path] = []
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
        runtimes = [Path(p) for p in sorted(loaded) if re.match(r"lib(gomp|omp|iomp5)\b.*\.so", Path(p).name)]
    else:
        runtimes = [p for p in sorted((home / "lib").glob("lib*.dylib")) if re.match(r"lib(omp|iomp5)\b", p.name)]
    # wheels of torch keep it in torch/lib or torch.libs; other packages may have brought one of their own
    return min(runtimes, key=lambda p: not str(p.resolve()).startswith(str(home)), default=None)
