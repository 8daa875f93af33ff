"""What cannot be printed stops nothing: the work is done, the artifact is there, and one line says what was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.output import named_output
from kvcompile.paths import require_short

FAKE = """
import resource, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

def compile_config(config):
    from kvcompile.artifact.artifact import place
    folder = place(config.output)
    print("measured " * 2000)
    folder.mkdir(parents=True)
    print("saved " * 2000)
    if config.prefill_chunk == 77:
        raise OSError(28, "No space left on device", "x" * 500)
    if config.prefill_chunk == 78:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return SimpleNamespace(path=config.output, summary={"needle": 0.5})

sys.modules["kvcompile.job"] = job = ModuleType("kvcompile.job")  # the real one imports torch
job.compile_config = compile_config
sys.argv[0] = "kvcompile"
from kvcompile.cli import main
main()
"""
RUN = f"exec '{sys.executable}' -c \"$FAKE\" "
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


def shell(where: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A command line in which `kvcompile` is our script, its compiler a fake."""
    environment = {**os.environ, "FAKE": FAKE, "COLUMNS": "200"}
    script = f'kvcompile() {{ ( {RUN} "$@" ) }}; {command}'
    shell = ["/bin/bash", "-o", "pipefail", "-c", script]
    return subprocess.run(shell, cwd=where, env=environment, capture_output=True, text=True, check=False)


@full
@pytest.mark.parametrize("job", ["recipe=snapkv", "-m recipe=snapkv,h2o"])
@pytest.mark.parametrize(("to", "why"), [(">&-", "closed"), (">/dev/full", "No space left on device")])
def test_a_compile_that_cannot_print_leaves_its_artifact(job: str, to: str, why: str, tmp_path: Path) -> None:
    done = shell(tmp_path, f"kvcompile {job} output=a {to}")
    assert [path.name for path in tmp_path.iterdir() if path.name != "multirun"] == ["a"]
    assert f"must have somewhere to go, got standard output: {why}. Fix: send it to" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


@full
@pytest.mark.parametrize("command", ["ls", "--version", "plan=only recipe=snapkv"])
def test_what_only_prints_says_that_it_could_not(command: str, tmp_path: Path) -> None:
    done = shell(tmp_path, f"kvcompile {command} >/dev/full")
    assert "Fix: send it to a terminal, a pipe or a file with room" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    done = shell(tmp_path, "kvcompile recipe=snapkv output=a | head -c 5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "measu", "")
    assert (tmp_path / "a").is_dir()


def test_a_file_opened_later_does_not_become_standard_output(tmp_path: Path) -> None:
    """With number 1 closed the next file gets it, and what a library prints lands in that file."""
    code = "from kvcompile.output import _fill; _fill(); import os; f = open('w', 'w'); os.write(1, b'x'); f.close()"
    subprocess.run(["/bin/sh", "-c", f"exec '{sys.executable}' -c \"{code}\" >&-"], cwd=tmp_path, check=True)
    assert (tmp_path / "w").read_text() == ""


def test_a_device_without_room_is_one_line(tmp_path: Path) -> None:
    done = shell(tmp_path, "kvcompile recipe=snapkv prefill_chunk=77 output=a")
    assert "No space left on device: xxx" in done.stderr
    assert "Fix: make room" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert len(done.stderr) < 300


def test_a_job_of_a_sweep_without_room_is_recorded_on_one_line(tmp_path: Path) -> None:
    done = shell(tmp_path, "kvcompile -m recipe=snapkv,h2o prefill_chunk=77 output=a")
    (path, _) = sorted(tmp_path.rglob("result.json"))
    assert json.loads(path.read_text())["error"].startswith("files must be written, got No space left on device: xxx")
    assert "Traceback" not in done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (1, "2 of 2 jobs failed\n")


def test_a_sweep_whose_results_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """No file may grow once the first job is done: neither its result nor the summary."""
    done = shell(tmp_path, "kvcompile -m recipe=snapkv,h2o prefill_chunk=78 output=a")
    assert done.stderr == "files must be written, got File too large. Fix: make room, or output=<elsewhere>.\n"
    assert done.returncode == 1


def test_a_deleted_folder_is_one_line(tmp_path: Path) -> None:
    done = shell(tmp_path, "mkdir gone; cd gone; rmdir ../gone; kvcompile recipe=snapkv")
    assert done.stderr == "the current folder must exist, got one that was deleted. Fix: cd to another.\n"


def test_a_path_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    """Names beside and below it count too; whatever is refused is named in part."""
    for name in ("x" * 300, "x" * 250, "abcd/" * 1000 + "x", "abcd/" * 810 + "x"):
        with pytest.raises(KvcompileError, match=r"the system takes, got \d+ characters, /.* Fix: output=") as error:
            require_short(Path("/", name))
        assert len(str(error.value)) < 300
    require_short(tmp_path / ("x" * 240))
    require_short(Path("/"))
    done = shell(tmp_path, f"kvcompile recipe=snapkv output={'x' * 300}")
    assert "got 3" in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr


def test_lines_of_a_job_begin_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines alone are handed on, so that those of two processes do not mix; what was begun is not lost."""
    with named_output("job 3 | "):
        print("one\ntw", end="")
        assert capsys.readouterr().out == "job 3 | one\n"
        print("o\n\n  \nthree", end="")
        print("wrong", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert capsys.readouterr() == ("job 3 | two\njob 3 | three\n", "job 3 | wrong\n")
    print("four")
    assert capsys.readouterr().out == "four\n"
