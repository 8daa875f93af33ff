"""`kvcompile doctor`: what it says of this machine and of recipes, what is a problem, and its exit code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompile.doctor import command, examine, machine, recipes
from kvcompile.doctor.examine import Examination
from kvcompile.doctor.recipes import Needs
from kvcompile.errors import KvcompileError
from kvcompile.kernels import dispatch
from kvcompile.kernels.backend import Backend
from kvcompile.kernels.dispatch import CPP, SDPA
from kvcompile.kernels.selfcheck import trust
from kvcompile.kernels.selfcheck.trust import trusted
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.stores.plan_kernels import PlanKernels

CPU = torch.device("cpu")
RIGHT = Verdict("", 1e-7, 1e-3, 2e-3)
FEW = ["kivi", "snapkv_kivi", "quest", "h2o"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few recipes, a machine with nothing wrong, and checks that find nothing."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(examine, "names", lambda: FEW)
    monkeypatch.setattr(examine, "machine", lambda: [("CPU", "any", "")])
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "check", lambda *_: RIGHT)


def backed(monkeypatch: pytest.MonkeyPatch, backend: Backend, checked: bool = False) -> None:
    """As if `kernels=auto` meant this backend here, as it is or once it is checked."""
    monkeypatch.setattr(recipes, "choose", lambda *_: trusted(backend, CPU) if checked else backend)
    monkeypatch.setattr(examine, "named", lambda name: backend)


def run(*arguments: str) -> int:
    try:
        command.main(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_recipes_are_planned_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.models import loading

    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights were read"))
    found = list(recipes.needs(["quest", "mla", "block_transformer", "leankv"], ["kernels=sdpa"]))
    assert set(recipes.names()) > {each.recipe for each in found}
    assert not [each.problem for each in found if each.problem]
    assert all(
        each.plan and each.served() == {"sdpa": len(each.plan.decoder.layers)}
        for each in found
        if each.recipe != "leankv"
    )
    specs = {each.recipe: {spec.name for spec in each.specs} for each in found}
    assert any(name.startswith("paged1-") for name in specs["quest"]), "what is recalled is read too"
    specs = {each.recipe: {spec.name for spec in each.specs} for each in recipes.needs(["snapkv"], [])}
    assert any(name.endswith("-scores") for name in specs["snapkv"]), "column sums of the last queries"


@pytest.mark.usefixtures("few")
def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    backed(monkeypatch, CPP)
    assert run() == 0
    out = capsys.readouterr().out
    assert "All is well." in out
    assert "cpp  kivi, snapkv_kivi, quest, h2o" in " ".join(out.split()).replace("cpp ", "cpp  ")
    assert "ragged-int4c32_int4t32+dense-float32-g3-d64" in out


@pytest.mark.usefixtures("few")
def test_json_says_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    backed(monkeypatch, CPP)
    assert run("--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["well"] is True
    assert said["problems"] == []
    assert said["machine"] == {"CPU": "any"}
    assert (said["backend"], said["device"]) == ("cpp", "cpu")
    assert said["recipes"]["kivi"] == {"cpp": 30}
    one = next(each for each in said["kernels"] if each["name"] == "paged1-float32-g3-d64")
    assert one == {"name": one["name"], "dtype": "float32", "taken": True, "problem": "", "error": 1e-7} | {
        "kernel": 1e-3,
        "library": 2e-3,
        "report": "",
    }


@pytest.mark.usefixtures("few")
def test_a_wrong_kernel_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, what to do, and JSON that any reader takes."""
    backed(monkeypatch, CPP)
    wrong = Verdict("differs from the reference", float("inf"))
    monkeypatch.setattr(trust, "check", lambda backend, spec, *_: wrong if "paged1" in spec.name else RIGHT)
    assert run() == 1
    out = capsys.readouterr().out
    assert "- the cpp kernel paged1-float32-g3-d64 for float32: differs from the reference. Please send" in out
    assert "Until it is mended: kernels=sdpa" in out
    assert "WRONG" in out
    assert run("--json") == 1
    said = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["well"] is False
    assert [each["error"] for each in said["kernels"] if each["problem"]] == [None]


@pytest.mark.usefixtures("few")
def test_what_auto_takes_once_it_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """As on a GPU: slow kernels leave layers to the library and are no problem, wrong ones are one, told once."""
    backed(monkeypatch, CPP, checked=True)
    slow, wrong = Verdict("", 1e-7, 3e-3, 2e-3), Verdict("fails", 1.0)
    found = {"ragged-int4c32_int4t32+dense-float32-g3-d64": slow, "ragged-int8t64_int4t64+dense-float32-g3-d64": wrong}
    monkeypatch.setattr(trust, "check", lambda backend, spec, *_: found.get(spec.name, RIGHT))
    assert run("--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["recipes"]["kivi"] == said["recipes"]["snapkv_kivi"] == {"sdpa": 30}
    assert said["recipes"]["quest"] == said["recipes"]["h2o"] == {"cpp": 30}
    assert len(said["problems"]) == 1
    assert "kernels=sdpa" not in said["problems"][0], "auto does that already"
    taken = {each["name"]: each["taken"] for each in said["kernels"]}
    assert [taken[name] for name in found] == [False, False]
    assert not recwarn.list


@pytest.mark.usefixtures("few")
def test_nothing_runs_without_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    backed(monkeypatch, CPP, checked=True)
    monkeypatch.setattr(trust, "check", lambda *_: pytest.fail("a kernel ran"))
    assert run("--no-checks") == 0
    assert "cpp or sdpa, once checked" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_again_checks_what_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    backed(monkeypatch, CPP)
    ran: list[str] = []
    monkeypatch.setattr(trust, "check", lambda backend, spec, *_: ran.append(spec.name) or RIGHT)
    run("--json")
    once = len(ran)
    assert once == len(json.loads(capsys.readouterr().out)["kernels"]) > 5
    run("--json")
    assert len(ran) == once
    run("--json", "--again")
    assert len(ran) == 2 * once


@pytest.mark.usefixtures("few")
def test_settings_are_of_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("kernels=reference", "model.dtype=bfloat16", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["backend"] == "reference"
    assert {each["dtype"] for each in said["kernels"]} == {"bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recipe=kivi"], "looks at every recipe"),
        (["policy=[kivi]"], "looks at every recipe"),
        (["kernels=cuda"], "one of auto, cpp"),
        (["modle=llama"], "modle"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_what_it_does_not_take_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(KvcompileError, match=said) as error:
        command.main(arguments)
    assert "\n" not in str(error.value)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(word in out for word in ("SETTING", "--json", "--again", "--no-checks", "Exit code 0"))


def test_a_recipe_that_cannot_be_planned_is_a_problem() -> None:
    found = Examination([], CPU, SDPA, [Needs("odd", None, SDPA, CPU, "no such layer")], [])
    assert found.problems == ["recipe odd: no such layer"]
    assert "no such layer" in command.as_text(found)
    assert command.as_json(found)["recipes"] == {"odd": "no such layer"}


def wrong_here() -> dict[str, str]:
    return {what: wrong for what, _, wrong in machine.machine() if wrong}


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    said = wrong_here()["compiler"]
    assert "no c++ or g++ or clang++ on the path" in said
    assert "install g++" in said


@pytest.mark.skipif(os.name != "posix", reason="no such permissions")
def test_a_cache_folder_that_is_of_no_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    for folder, said in ((tmp_path / "file" / "below", "cannot be kept"), (tmp_path / "open", "others can write")):
        if folder.name == "open":
            folder.mkdir()
            folder.chmod(0o777)
        monkeypatch.setenv("KVCOMPILE_CACHE", str(folder))
        assert said in machine._folder()[2]
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "good"))
    assert machine._folder() == ("cache folder", str(tmp_path / "good"), "")


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert machine._threads() == ("threads", "8 of torch", "torch runs 8 threads on 1 cores. Fix: OMP_NUM_THREADS=1")


def test_a_gpu_without_triton_or_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert machine._triton() == ("Triton", "not installed", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "a GPU without Triton" in machine._triton()[2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.identity, "DRIVERS", (str(tmp_path),))
    (line,) = machine._gpus()
    assert "which torch" in line[2]


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Facts:
        name, major, minor, multi_processor_count, total_memory = "Some GPU", 9, 0, 132, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Facts)
    (line,) = machine._gpus()
    assert line[:2] == (
        "GPU 0",
        f"Some GPU, compute 9.0, 132 multiprocessors, 80 GiB; {machine.identity.driver(torch.device('cuda'))}",
    )
    assert not line[2]


def test_extensions_that_do_not_load_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise KvcompileError("the backend 'x' of another package does not load")

    monkeypatch.setattr(dispatch, "backends", broken)
    assert "does not load" in machine._backends()[2]


def test_what_the_reference_serves_is_said() -> None:
    """Sums at every step are what the library has not."""
    (each,) = recipes.needs(["leankv"], ["kernels=sdpa"])
    assert each.served() == {"reference": 30}


def test_scores_whose_kernel_is_wrong_are_computed_beside_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    backed(monkeypatch, CPP, checked=True)
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(
        trust.records, "remembered", lambda facts, *_: Verdict("x") if "-scores" in facts["spec"] else RIGHT
    )
    (each,) = recipes.needs(["h2o"], [])
    assert each.served() == {"cpp": 30}, "without sums"
    assert all(spec.scores for spec in each.specs if spec not in PlanKernels(each.plan, SDPA).first(0))
