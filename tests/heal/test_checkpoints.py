"""Folders of checkpoints: whose they are, which one is whole; and what a training leaves of flags and gradients."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from kvcompile.build import plan_of
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.heal import checkpoints
from kvcompile.heal.weights import flags_kept, own, train_only


def owner(*overrides: str) -> str:
    config = compose(["policy=[mqa]", *overrides])
    return checkpoints.fingerprint(config, plan_of(tiny_config("llama"), "float32", config, config.policies()))


@pytest.mark.parametrize(
    "change", ["heal.lr=1e-3", "heal.seed=7", "heal.accumulate=2", "policy=[gqa]", "stack.mqa.merge=first"]
)
def test_a_training_of_something_else_or_in_another_way_has_another_name(change: str) -> None:
    assert owner(change) != owner()


def test_a_training_of_another_model_has_another_name() -> None:
    config = compose(["policy=[mqa]"])
    plan = plan_of(tiny_config("llama"), "float32", config, config.policies())
    other = replace(config, model=replace(config.model, revision="another"))
    assert checkpoints.fingerprint(other, plan) != checkpoints.fingerprint(config, plan)


def test_a_training_may_go_on_for_longer() -> None:
    free = ("heal.tokens=9999999", "heal.minutes=7", "heal.checkpoint_minutes=1", "heal.resume=false")
    assert owner(*free) == owner()


def test_the_newest_whole_checkpoint_is_resumed(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    for step, whole in ((9, True), (10, True), (99, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert checkpoints.newest(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("mark", ['{"fingerprint": "other"}', "[]", "{", "{}"])
def test_a_folder_is_emptied_unless_it_is_of_the_same_owner(mark: str, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    for _ in range(2):
        with checkpoints.opened(folder) as place:
            checkpoints.claim(place, "me")
            (place / "checkpoint-3").mkdir(exist_ok=True)
    (folder / checkpoints.MARK).write_text(mark)
    with checkpoints.opened(folder) as place:
        assert (place / "checkpoint-3").is_dir(), "it may yet be refused what it wants the folder for"
        checkpoints.claim(place, "me")
        assert [p.name for p in place.iterdir()] == [checkpoints.MARK]
        assert json.loads((place / checkpoints.MARK).read_text()) == {"fingerprint": "me"}


def fail(folder: Path, error: BaseException, claims: bool) -> None:
    with checkpoints.opened(folder) as place:
        if claims:
            checkpoints.claim(place, "me")
        raise error


@pytest.mark.parametrize("before", [[], ["outputs"], ["outputs", "outputs/w-heal"]], ids=len)
def test_what_fails_before_its_first_checkpoint_leaves_nothing(before: list[str], tmp_path: Path) -> None:
    for name in before:
        (tmp_path / name).mkdir()
    for error, claims in itertools.product((KvcompileError("rule", "given"), KeyboardInterrupt()), (False, True)):
        with pytest.raises(type(error)):
            fail(tmp_path / "outputs/w-heal", error, claims)
        assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == before


def test_what_fails_later_keeps_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "w" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "w" / checkpoints.MARK).write_text('{"fingerprint": "me"}')
    for claims in (False, True):
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / "w", KeyboardInterrupt(), claims)
    with checkpoints.opened(tmp_path / "w") as place:
        checkpoints.claim(place, "me")
        assert (place / "checkpoint-3").is_dir(), "and its mark, by which it is known"


def test_without_a_folder_nothing_is_left() -> None:
    with checkpoints.opened(None) as place:
        (place / "checkpoint-3").mkdir()
    assert not place.exists()


def test_flags_are_as_before_and_no_gradient_stays() -> None:
    """Of weights that became copies too: an adapter freezes what it stands beside."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].requires_grad_(False)
    shared = list(model.parameters())
    with flags_kept(model):
        own(model, ["2"])
        train_only(model, ["0"])
        model(torch.ones(1, 2)).sum().backward()
        assert [p.requires_grad for p in model.parameters()] == [True] * 2 + [False] * 4
    for parameters in (shared, list(model.parameters())):
        assert [p.requires_grad for p in parameters] == [True, True, False, False, True, True]
        assert all(p.grad is None for p in parameters)
    assert [a is b for a, b in zip(shared, model.parameters(), strict=True)] == [True] * 4 + [False] * 2
