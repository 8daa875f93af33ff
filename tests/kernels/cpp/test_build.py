"""The toolchain: one compile a source, safe beside others, torch's threads, and a plain word where nothing works."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kvcompile.errors import KvcompileError
from kvcompile.kernels.cpp import build

WORKS = build.available() is None
needs_compiler = pytest.mark.skipif(not WORKS, reason=f"no compiler: {build.available()}")
SOURCE = 'extern "C" int answer() { return 42; }\n'
TEAM = """
extern "C" int omp_get_thread_num();
extern "C" int team(int threads) {
  int seen = 0;
#pragma omp parallel num_threads(threads) reduction(+ : seen)
  seen += 1;
  return seen;
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CXX is a compiler that writes a line into this file for each compile (not for links and questions)."""
    log = tmp_path / "compiles"
    log.write_text("")
    script = tmp_path / "counting-c++"
    real = build.toolchain().compiler[0]
    script.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) echo "$*" >> "{log}";; esac\nexec "{real}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return log


def compiles(log: Path, name: str) -> int:
    return sum(f"{name}-" in line for line in log.read_text().splitlines())


@needs_compiler
def test_a_library_is_compiled_once_and_its_source_kept(cache: Path, compiler: Path) -> None:
    assert build.load(SOURCE, "one")["answer"]() == 42
    assert build.load(SOURCE, "one") is build.load(SOURCE, "one")
    assert compiles(compiler, "one") == 1
    names = sorted(p.name for p in cache.iterdir() if p.name.startswith("one-"))
    assert [n.rpartition(".")[2] for n in names] == ["cpp", "sha256", "so"]
    assert (cache / names[0]).read_text() == SOURCE


@needs_compiler
def test_another_process_finds_it(cache: Path, compiler: Path) -> None:
    build.load(SOURCE, "found")
    code = f"from kvcompile.kernels.cpp import build; print(build.load({SOURCE!r}, 'found')['answer']())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "42"
    assert compiles(compiler, "found") == 1


@needs_compiler
def test_source_flags_and_compiler_make_the_key(cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 'extern "C" int answer() { return NUMBER; }\n'
    assert build.load(number, "key", ("-DNUMBER=1",))["answer"]() == 1
    assert build.load(number, "key", ("-DNUMBER=2",))["answer"]() == 2
    assert build.load(number.replace("NUMBER", "3"), "key")["answer"]() == 3
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DNUMBER=4")
    assert build.load(number, "key")["answer"]() == 4
    assert compiles(compiler, "key") == 4


@needs_compiler
def test_threads_ask_at_once_and_one_compiles(cache: Path, compiler: Path) -> None:
    gate, got = threading.Barrier(6), []

    def work() -> None:
        gate.wait()
        got.append(build.load(SOURCE, "threads"))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(library) for library in got}) == 1
    assert compiles(compiler, "threads") == 1


@needs_compiler
def test_processes_ask_at_once_and_one_compiles(cache: Path, compiler: Path, tmp_path: Path) -> None:
    """Each waits at a gate, its imports done, until all are there."""
    build.toolchain()
    code = f"""
import os, pathlib, sys, time
from kvcompile.kernels.cpp import build
build.toolchain()
gate = pathlib.Path({str(tmp_path)!r})
(gate / f"ready-{{os.getpid()}}").touch()
while not (gate / "open").exists(): time.sleep(0.002)
print(build.load({SOURCE!r}, "processes")["answer"]())
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(p.poll() in (None, 0) for p in running)
    (tmp_path / "open").touch()
    assert [p.communicate(timeout=60)[0].strip() for p in running] == ["42"] * 2
    assert compiles(compiler, "processes") == 1
    assert not list(cache.glob(".making-*")), "nothing half made is left behind"


LOAD = "from kvcompile.kernels.cpp import build; print(build.load({source!r}, {name!r})['answer']())"
NO_LOCKS = """
import fcntl
def refuse(*_): raise OSError("no locks on this file system")
fcntl.flock = refuse
"""


@pytest.fixture
def slow_linker(compiler: Path) -> Path:
    """$CXX writes half of a library, touches the file returned, and waits before it writes the rest."""
    script, begun = Path(os.environ["CXX"]), compiler.with_name("linking")
    slow = compiler.with_name("slow-c++")
    slow.write_text(
        f"""#!/bin/sh
case " $* " in *" -shared "*) ;; *) exec "{script}" "$@";; esac
before=; for argument in "$@"; do [ "$before" = -o ] && out=$argument; before=$argument; done
"{script}" "$@" || exit
cp "$out" "$out.whole" && head -c 2000 "$out.whole" > "$out"
touch "{begun}"
sleep 0.6
cat "$out.whole" > "$out"
"""
    )
    slow.chmod(0o700)
    os.environ["CXX"] = str(slow)
    build.load(SOURCE, "warm")  # nobody waits for the probe
    begun.unlink()
    return begun


def started(name: str, source: str = SOURCE, before: str = "") -> subprocess.Popen[str]:
    code = before + LOAD.format(source=source, name=name)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def answered(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=120)[0].strip()


@needs_compiler
@pytest.mark.parametrize("before", ["", NO_LOCKS], ids=["locks", "no locks"])
def test_a_half_written_library_is_never_loaded(cache: Path, slow_linker: Path, compiler: Path, before: str) -> None:
    """It gets its name when it is whole; two processes that build the same each read a source of their own."""
    processes = [started("half", before=before) for _ in range(2)]
    sizes = set()
    while any(p.poll() is None for p in processes):
        sizes |= {path.stat().st_size for path in cache.glob("half-*.so")}
        time.sleep(0.002)
    assert [answered(p) for p in processes] == ["42", "42"]
    assert slow_linker.exists()
    whole = {path.stat().st_size for path in cache.glob("half-*.so")}
    assert len(whole) == 1
    assert sizes <= whole
    assert compiles(compiler, "half") == 1 if not before else compiles(compiler, "half") <= 2
    assert all(".making-" in line for line in compiler.read_text().splitlines())


@needs_compiler
def test_a_process_that_is_killed_leaves_nothing_to_load_and_no_lock(cache: Path, slow_linker: Path) -> None:
    killed = started("killed")
    while not slow_linker.exists():
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    assert not list(cache.glob("killed-*.so"))
    assert answered(started("killed")) == "42"


@needs_compiler
def test_a_source_that_does_not_compile_says_so_and_leaves_no_library(cache: Path) -> None:
    with pytest.raises(KvcompileError, match=r"must accept a generated kernel.*cpp:1:.*error.*Fix: set kernels=sdpa"):
        build.load("int nonsense(", "broken")
    assert not list(cache.glob("broken-*.so"))


@needs_compiler
def test_the_openmp_runtime_is_the_one_of_torch() -> None:
    """Two runtimes in one process would be two pools of threads that fight for the cores."""
    tools = build.toolchain()
    if tools.openmp is None:
        pytest.skip(tools.note)
    library = build.load(TEAM, "team")
    assert [library["team"](n) for n in (1, 2, 3)] == [1, 2, 3]
    if sys.platform == "linux":
        code = (
            f"from kvcompile.kernels.cpp import build; import torch; build.load({TEAM!r}, 'team')['team'](2)\n"
            "torch.randn(300, 300) @ torch.randn(300, 300)\n"
            "names = {l.split()[-1] for l in open('/proc/self/maps') if '/' in l}\n"
            "print(sorted(n for n in names if 'libgomp' in n or 'libomp' in n or 'libiomp' in n))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        (runtime,) = eval(done.stdout)
        assert runtime == tools.openmp.runtime
        assert str(Path(torch.__file__).parent) in runtime


@needs_compiler
def test_without_openmp_kernels_run_on_one_thread_and_say_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_runtime", lambda: None)
    build._toolchain.cache_clear()
    try:
        assert build.toolchain().openmp is None
        assert "one thread (torch has loaded no OpenMP runtime)" in build.describe()
        assert build.load(TEAM.replace("omp_get_thread_num", "unused"), "alone")["team"](4) == 1
    finally:
        build._toolchain.cache_clear()


@needs_compiler
def test_an_openmp_that_does_not_link_is_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_runtime", lambda: Path("/nowhere/libgomp.so.1"))
    build._toolchain.cache_clear()
    try:
        assert "one thread (it builds nothing with OpenMP)" in build.describe()
    finally:
        build._toolchain.cache_clear()


def test_clang_is_not_given_libgomp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_runtime", lambda: Path("/torch/lib/libgomp-a34b3233.so.1"))
    assert build._openmp(clang=True) == (None, "clang cannot use torch's libgomp-a34b3233.so.1, g++ can")
    assert build._openmp(clang=False)[0] is not None
    monkeypatch.setattr(build, "_runtime", lambda: Path("/torch/lib/libiomp5.so"))
    assert build._openmp(clang=True)[0] is not None


@needs_compiler
def test_describe_names_compiler_vectors_flags_and_threads() -> None:
    text = build.describe()
    assert build.toolchain().version in text
    assert build.toolchain().simd in text
    assert "-O3" in text
    assert "OpenMP" in text or "one thread" in text
    assert "\n" not in text


@needs_compiler
@pytest.mark.skipif(build.available() is not None or "__x86_64__" not in build.toolchain().macros, reason="x86 names")
@pytest.mark.parametrize(("flag", "simd"), [("-march=x86-64", "portable vectors"), ("-march=haswell", "AVX2")])
def test_the_vectors_named_are_those_the_header_takes(flag: str, simd: str) -> None:
    from dataclasses import replace

    from kvcompile.kernels.cpp.simd import prelude

    tools = build.toolchain()
    macros = build._output([*tools.compiler, flag, "-dM", "-E", "-x", "c++", os.devnull])
    assert replace(tools, macros=macros).simd == simd
    width = (
        'extern "C" int width() { return std::is_same<F, V16>::value ? 16 : std::is_same<F, Pair<V8>>::value ? 8 : 4; }'
    )
    assert build.load(prelude() + width, "width", (flag,))["width"]() == {"AVX2": 8}.get(simd, 4)
    native = build.load(prelude() + width, "width")["width"]()
    assert tools.simd == {16: "AVX-512", 8: "AVX2", 4: "portable vectors"}[native]


def test_no_compiler_is_a_plain_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.available() == "no c++ or g++ or clang++ on the path"
    with pytest.raises(KvcompileError, match=r"Fix: install g\+\+ or clang\+\+ .* or set kernels=sdpa"):
        build.load(SOURCE, "none")


def test_a_named_compiler_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert build.available() == "no no-such-compiler -O1 on the path"
    false = shutil.which("false")
    if false:
        monkeypatch.setenv("CXX", false)
        assert build.available() == f"{false}: it preprocesses no C++17"


WRONG = {
    "echo": "echo: it preprocesses no C++17",
    "'g++": "$CXX='g++ is no command: No closing quotation",
    "/etc/passwd": "no /etc/passwd on the path",
    '""': 'no "" on the path',
}


@pytest.mark.parametrize("named", WRONG)
def test_a_wrong_compiler_is_a_plain_word(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    assert build.available() == WRONG[named]
    with pytest.raises(KvcompileError, match=r"must be built on this machine, got .*Fix: install g\+\+") as error:
        build.toolchain()
    assert "\n" not in str(error.value)


def scripted(path: Path, text: str) -> str:
    """A command that runs a shell script, `$REAL` in it the compiler that works here."""
    path.write_text("#!/bin/sh\n" + text.replace("$REAL", build.toolchain().compiler[0]))
    path.chmod(0o700)
    return str(path)


@needs_compiler
def test_a_compiler_that_makes_nothing_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = scripted(tmp_path / "lazy-c++", 'case " $* " in *" -c "*) exit 0;; esac\nexec $REAL "$@"\n')
    monkeypatch.setenv("CXX", lazy)
    assert str(build.available()).startswith(f"{lazy}: {lazy} wrote no .o from {cache}/probe-")


@needs_compiler
def test_what_a_compiler_says_need_not_be_utf8(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = (
        'case " $* " in *broken*-c*|*-c*broken*) printf "error: gr\\366\\337er" >&2; exit 1;; esac\nexec $REAL "$@"\n'
    )
    monkeypatch.setenv("CXX", scripted(tmp_path / "latin-c++", latin))
    with pytest.raises(KvcompileError, match="must accept a generated kernel, got error: gr\ufffd\ufffder from "):
        build.load(SOURCE, "broken")


@needs_compiler
def test_a_compiler_that_hangs_is_stopped(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it started; at a kernel it is an error, at a question another reason to run without."""
    pid = tmp_path / "pid"
    hang = f'sleep 600 & echo $! > "{pid}"; wait'
    at_kernel = scripted(tmp_path / "kernel-c++", f'case " $* " in *slow*) {hang};; esac\nexec $REAL "$@"\n')
    always = scripted(tmp_path / "always-c++", f"{hang}\n")
    monkeypatch.setenv("CXX", at_kernel)
    build.toolchain()
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.5)
    with pytest.raises(KvcompileError, match=r"done with a kernel in 0 s, got kernel-c\+\+, still at .*slow.* Fix: "):
        build.load(SOURCE, "slow")
    while (state := Path(f"/proc/{pid.read_text().strip()}/stat")).exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.01)
    monkeypatch.setenv("CXX", always)
    monkeypatch.setattr(build, "ANSWER_SECONDS", 0.5)
    assert build.available() == f"{always}: no answer in 0 s"


@needs_compiler
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KvcompileError, match="KVCOMPILE_CACHE"):
        build.load(SOURCE, "readonly")


@needs_compiler
def test_a_cache_under_a_file_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.toolchain()
    (tmp_path / "file").write_text("")
    tools = build.toolchain()
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "file"))
    with pytest.raises(KvcompileError, match="Fix: set KVCOMPILE_CACHE"):
        build._load(tools, SOURCE, "blocked")
    with pytest.raises(KvcompileError, match="file"):
        build.load(SOURCE, "blocked")
