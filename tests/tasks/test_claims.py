"""Claims: one process at a time, a live one is left alone, and a dead one's is taken over by one alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from pathlib import Path

import pytest

from kvcompile.tasks.claims import Claims


def test_a_claim_is_ours_until_it_ends(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.claim("a") as ours:
        assert ours
        with second.claim("a") as theirs, second.claim("b") as another:
            assert (theirs, another) == (False, True)
    assert list(tmp_path.iterdir()) == []
    with second.claim("a") as ours:
        assert ours


def test_an_error_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Claims(tmp_path).claim("a"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def left_behind(folder: Path, host: str, pid: int) -> Path:
    path = folder / ".a.claim"
    path.write_text(json.dumps({"host": host, "pid": pid, "token": "x"}))
    return path


def test_that_of_a_process_which_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    gone = multiprocessing.get_context("spawn").Process(target=int)
    gone.start()
    gone.join()
    left_behind(tmp_path, platform.node(), gone.pid or 0)
    with Claims(tmp_path).claim("a") as ours:
        assert ours
    assert list(tmp_path.iterdir()) == []


def test_that_of_another_machine_is_taken_over_where_nobody_touches_it(tmp_path: Path) -> None:
    path = left_behind(tmp_path, "elsewhere", os.getpid())
    claims = Claims(tmp_path, patience=0.2)
    os.utime(path, (0, 0))  # no clock of another machine is believed
    for _ in range(4):
        with claims.claim("a") as ours:
            assert not ours
        time.sleep(0.1)
        os.utime(path)  # it lives
    time.sleep(0.3)
    with claims.claim("a") as ours:
        assert not ours, "it was touched since we looked"
    time.sleep(0.3)
    with claims.claim("a") as ours:
        assert ours


def test_a_live_process_touches_its_claim(tmp_path: Path) -> None:
    with Claims(tmp_path, beat=0.02).claim("a"):
        path = tmp_path / ".a.claim"
        os.utime(path, (0, 0))
        for _ in range(200):
            if path.stat().st_mtime > 0:
                break
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


def test_what_was_taken_from_us_is_left_to_its_new_owner(tmp_path: Path) -> None:
    with Claims(tmp_path).claim("a"):
        path = left_behind(tmp_path, "elsewhere", 1)
    assert path.exists()


def work(folder: Path, number: int) -> None:
    """Count up a file that is no place for two, whenever the claim is ours; give up after many tries."""
    claims = Claims(folder, patience=5)
    done = 0
    for _ in range(2000):
        with claims.claim("a") as ours:
            if ours:
                at = folder / "at-work"
                os.close(os.open(at, os.O_CREAT | os.O_EXCL))
                at.unlink()
                done += 1
                if done == 20:
                    (folder / f"done-{number}").touch()
                    return
        time.sleep(0.001)


def test_of_several_processes_one_is_at_work(tmp_path: Path) -> None:
    left_behind(tmp_path, platform.node(), 2**22 - 1)  # of none that lives
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(tmp_path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"done-{i}" for i in range(4)]
