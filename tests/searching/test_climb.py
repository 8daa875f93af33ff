"""Protects the search itself: what cannot be is refused, the best third climbs, the clock is kept, nothing is lost."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from contract_table import dense
from tiny_search import Fake, fake_search, space, words

from kvcompile.errors import KvcompileError
from kvcompile.searching import climb
from kvcompile.searching import study as studies
from kvcompile.searching.climb import Clock
from kvcompile.searching.run import choose
from kvcompile.searching.study import Study
from kvcompile.searching.wish import Wish

__all__ = ["words"]
pytestmark = pytest.mark.usefixtures("words")
BYTES = Wish(bytes=Fraction(1, 3), perplexity=1.1)


class Turns:
    """A time that goes on by one each time somebody looks."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return float(self.looks)


def clock(looks: float) -> Clock:
    return Clock(looks, Turns())


def test_the_best_third_of_all_so_far_climbs_and_what_is_found_is_the_best(tmp_path: Path) -> None:
    meter = Fake()
    search = fake_search(tmp_path, dense().config, BYTES, meter)
    search.run(clock(120))
    tried = search.study.tried()
    heights = [sum(len(t.scores) > rung for t in tried) for rung in range(3)]
    assert heights[0] > 12
    assert heights[0] / 3 <= heights[1] < heights[0] / 1.5
    assert heights[2] < heights[1]
    best, front = choose(search.found(), BYTES)
    assert best is front[0]
    at_last = [t.scores[-1].excess for t in search.found()]
    assert best.scores[-1].excess == min(at_last) <= 0.1
    assert best.scores[-1].contexts == 5
    for overrides in {each for each, _ in meter.asked}:  # contexts in their order, each once
        contexts = [context for each, context in meter.asked if each == overrides]
        assert contexts == list(range(len(contexts)))
        assert overrides in meter.forgotten


def test_what_holds_too_much_or_cannot_be_is_refused_by_its_plan(tmp_path: Path) -> None:
    meter = Fake()
    search = fake_search(tmp_path, dense().config, BYTES, meter)
    search.run(clock(60))
    refused = [t for t in search.study.study.trials if t.state.name == "PRUNED"]
    assert refused[0].params["score"] == "kivi"  # the second of `first`
    assert "at most 1/3.0 of the bfloat16 bytes" in refused[0].user_attrs["error"]
    assert refused[0].constraints["bytes"] > 0
    assert not [overrides for overrides, _ in meter.asked if "kivi" in overrides[0]]
    assert {t.share <= 1 / 3 for t in search.study.tried()} == {True}


def test_a_stack_that_fails_at_work_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    meter = Fake(fails="keydiff")
    said: list[str] = []
    search = fake_search(tmp_path, dense().config, BYTES, meter)
    object.__setattr__(search, "say", said.append)
    search.run(clock(60))
    assert said
    assert all("keydiff" in line and line.endswith("no memory") for line in said)
    failed = [t for t in search.study.study.trials if t.constraints.get("run") == 1.0]
    assert len(failed) == len(said)
    assert all("snapkv" in t.stack.options for t in search.study.tried())


def test_when_time_is_over_what_has_a_score_is_told_and_the_rest_waits_for_the_next_run(tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    fake_search(tmp_path, dense().config, BYTES, first).run(clock(9))
    search = fake_search(tmp_path, dense().config, BYTES, second)
    states = [t.state.name for t in search.study.study.trials]
    assert "RUNNING" not in states
    assert (states.count("COMPLETE"), states.count("WAITING")) == (1, 2)  # of the batch one has a score, as it must
    assert len(first.asked) < 3 * 2
    search.run(clock(60))
    scored, *waiting = dict.fromkeys(overrides for overrides, _ in first.asked)
    assert second.asked[0][0] == waiting[0]
    assert set(waiting) <= {overrides for overrides, _ in second.asked}
    assert search.study.tried()[0].stack.overrides == scored


@pytest.mark.parametrize("wish", [Wish(), Wish(quality=0.9), Wish(bytes=Fraction(1, 4), quality=0.9)])
def test_where_bytes_are_open_they_are_drawn_and_the_front_is_of_both(tmp_path: Path, wish: Wish) -> None:
    search = fake_search(tmp_path, dense().config, wish, Fake())
    search.run(clock(90))
    found = search.found()
    best, front = choose(found, wish)
    assert len({t.share for t in search.study.tried()}) > 5
    assert [t.share for t in front] == sorted(t.share for t in front)
    if wish.bytes:
        assert all(t.share <= wish.bytes for t in search.study.tried())
    good = [t for t in found if t.scores[-1].quality == 1.0]
    if good:
        assert best.share == min(t.share for t in good)


def test_a_space_of_nothing_that_can_be_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(climb, "FRUITLESS", 8)
    with pytest.raises(KvcompileError, match=r"must hold a stack that can be, got .*may be held"):
        fake_search(tmp_path, dense().config, Wish(bytes=Fraction(1, 500)), Fake()).run(clock(10_000))


def test_trials_of_a_process_that_is_gone_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fake_search(tmp_path, dense().config, BYTES, Fake())
    search.study.begin([space().begin(first) for first in space().first[:1]])
    (mine,) = search.ask(clock(1000), 3)[:1]
    assert search.study.rescue() == 0
    monkeypatch.setattr(studies, "_started", lambda pid: "later")  # its number is another process's now
    assert search.study.rescue() == 3
    assert search.study.rescue() == 0
    again = fake_search(tmp_path, dense().config, BYTES, Fake()).ask(clock(1000), 3)
    assert mine.stack.overrides in {c.stack.overrides for c in again}


def test_a_silent_worker_elsewhere_counts_as_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = fake_search(tmp_path, dense().config, BYTES, Fake())
    search.ask(clock(1000), 3)
    monkeypatch.setattr(studies.socket, "gethostname", lambda: "another")
    assert search.study.rescue() == 0
    monkeypatch.setattr(studies, "SILENT", -1.0)
    assert search.study.rescue() == 3


def test_a_study_holds_one_search(tmp_path: Path) -> None:
    Study("a", None, tmp_path, 1, {"search.bytes": "1/24"}, 0)
    Study("a", None, tmp_path, 1, {"search.bytes": "1/24"}, 0)
    with pytest.raises(KvcompileError, match=r"search.bytes was '1/24' there, got '1/32'. Fix: search.study="):
        Study("a", None, tmp_path, 1, {"search.bytes": "1/32"}, 0)


def test_a_database_holds_a_study_as_a_file_does(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    search = fake_search(tmp_path, dense().config, BYTES, Fake(), url)
    search.run(clock(40))
    again = fake_search(tmp_path, dense().config, BYTES, Fake(), url)
    assert [t.stack.overrides for t in again.study.tried()] == [t.stack.overrides for t in search.study.tried()]
    with pytest.raises(KvcompileError, match=r"search.storage must be the URL of a database, got nonsense"):
        Study("a", "nonsense", tmp_path, 1, {}, 0)
