"""`kernels=auto` where kernels are checked: what is right and faster attends, the library in place of all else."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import kernels_to_check as toys
import pytest
import torch
from kernels_to_check import CPU, SPEC, backend

from kvcompile.errors import KvcompileError
from kvcompile.kernels import dispatch
from kvcompile.kernels.codecs import encode
from kvcompile.kernels.dispatch import CPP, SDPA, TRITON, choose, describe, serving, why
from kvcompile.kernels.selfcheck import check as checking
from kvcompile.kernels.selfcheck import trust
from kvcompile.kernels.selfcheck.trust import complaints, trusted, verdict


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "_warned", set())


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known, on disk or in this process; the library is slow."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path))
    new_process(monkeypatch)
    monkeypatch.setattr(checking, "times", lambda backend, *_: (3e-3 if backend.attend is toys.slow else 1e-3, 2e-3))


def quiet(made: dispatch.Backend) -> dispatch.Backend:
    """Who serves, with no warning allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return serving(made, SPEC, torch.float32)


def test_what_is_right_and_faster_attends() -> None:
    auto = trusted(backend(), CPU)
    assert quiet(auto) is auto
    assert describe(auto, SPEC, torch.float32) == "toy (faster than the library here, 1 ms beside 2 ms)"


def test_what_is_slow_leaves_it_to_the_library_and_the_report_says_so() -> None:
    auto = trusted(backend(toys.slow), CPU)
    assert quiet(auto) is SDPA
    said = "sdpa (toy: not faster than the library here, 3 ms beside 2 ms)"
    assert describe(auto, SPEC, torch.float32) == said


@pytest.mark.parametrize("attend", [toys.forgets_the_newest, toys.does_not_launch])
def test_what_is_wrong_is_warned_of_once_with_a_report_that_is_ready(attend) -> None:
    auto = trusted(backend(attend, "the text of the kernel"), CPU)
    with pytest.warns(UserWarning, match=r"the toy kernel ragged-float32-g2-d16 is not right on .*: .* bug report /"):
        assert serving(auto, SPEC, torch.float32) is SDPA
    assert quiet(auto) is SDPA, "warned of once a process"
    assert auto.checked is not None
    found = auto.checked(SPEC, torch.float32)
    page = Path(found.report).read_text("utf-8")
    for part in (found.problem, "the text of the kernel", repr(SPEC), f"- torch: {torch.__version__}", "- driver: "):
        assert part in page
    assert found.problem in describe(auto, SPEC, torch.float32)
    (said,) = complaints(CPU)
    assert found.report in said
    assert not complaints(torch.device("meta"))


def test_the_report_shows_the_problem_again() -> None:
    """What stands in it as Python says of a built-in kernel what the check said."""
    from kvcompile.kernels.selfcheck import bugreport, identity

    facts = identity.identity(dispatch.REFERENCE, SPEC, torch.float32, CPU)
    page = bugreport.text(dispatch.REFERENCE, SPEC, torch.float32, CPU, facts, checking.Verdict("differs"))
    code = page.split("```python\n")[1].split("```")[0].replace("print(check(", "found = (check(")
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["found"], checking.Verdict)
    assert names["found"].right


def test_another_process_is_warned_too_and_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = trusted(backend(toys.forgets_the_newest), CPU)
    with pytest.warns(UserWarning, match="not right"):
        serving(auto, SPEC, torch.float32)
    new_process(monkeypatch)
    monkeypatch.setattr(trust, "check", lambda *_: pytest.fail("it was checked already"))
    with pytest.warns(UserWarning, match="not right"):
        assert serving(auto, SPEC, torch.float32) is SDPA


def test_a_kernel_that_was_mended_is_checked_again() -> None:
    """Its text is another; `again` checks the same text anew, and takes the report away."""
    wrong, mended = backend(toys.forgets_the_newest), backend(toys.right, "another text")
    report = Path(verdict(wrong, CPU, SPEC, torch.float32).report)
    assert verdict(mended, CPU, SPEC, torch.float32).taken
    assert report.exists()
    assert verdict(backend(toys.right), CPU, SPEC, torch.float32, again=True).taken
    assert not report.exists()


def test_scores_are_added_up_by_a_kernel_that_was_checked_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = trusted(backend(toys.wrong_sums), CPU)
    assert quiet(auto) is auto, "right without scores"
    with pytest.warns(UserWarning, match="-scores is not right"):
        assert not auto.takes(replace(SPEC, scores=True), torch.float32)


def test_what_no_check_looks_at_is_torchs() -> None:
    auto = trusted(CPP, CPU)
    assert auto.name == "cpp"
    assert auto.column_sums is CPP.column_sums
    assert auto.encode is encode
    for other in ("encode", "compact", "choose", "demote", "ghost", "linear"):
        assert getattr(auto, other) is not getattr(CPP, other)


def test_a_spec_without_a_kernel_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "check", lambda *_: pytest.fail("there is no kernel to check"))
    auto = trusted(CPP, CPU)
    assert serving(auto, replace(SPEC, bias=True), torch.float32) is SDPA
    assert describe(auto, SPEC, torch.float64) == "sdpa (cpp has no kernel for it in float64)"


def test_forced_kernels_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernels=triton` asks nobody; `auto` on a GPU checks Triton's, and says why where there is no Triton."""
    monkeypatch.setattr(dispatch, "TRITON", replace(TRITON, ready=lambda device: None))
    auto = choose("auto", "cuda")
    assert auto.name == "triton"
    assert auto.checked is not None
    assert why("cuda") == ""
    assert choose("auto", "cuda") is auto, "one object, so that kernels are looked up once"
    assert TRITON.checked is None
    assert serving(TRITON, SPEC, torch.float32) is TRITON

    def missing(device: torch.device) -> None:
        raise KvcompileError("kernels=triton needs Triton, which is not installed", fix="install it")

    monkeypatch.setattr(dispatch, "TRITON", replace(TRITON, ready=missing))
    assert choose("auto", "cuda") is SDPA
    assert why("cuda") == "kernels=triton needs Triton, which is not installed"


def test_a_model_runs_by_the_library_where_its_kernels_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits as `kernels=sdpa`, to the bit, and the report says why; h2o's sums are the library's then."""
    from tiny import tiny_ids, tiny_model

    from kvcompile.adapters.architectures import describe as plan_of
    from kvcompile.compiler import compile_plan
    from kvcompile.job import _kernels
    from kvcompile.runtime import model as runtime
    from kvcompile.stack import apply_stack, build_stack

    wrong = replace(CPP, attend=toys.does_not_launch, column_sums=None)
    outs = []
    for kernels in ("sdpa", "auto"):
        if kernels == "auto":
            for module in (dispatch, runtime):
                monkeypatch.setattr(module, "choose", lambda *_: trusted(wrong, CPU))
        model = tiny_model("llama")
        stack = apply_stack(plan_of(model.config), build_stack(["h2o"], {"h2o": {"budget": 12, "decode_every": 4}}))
        built = compile_plan(model, stack, kernels)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outs.append(built.generate(tiny_ids(1, 24), max_new_tokens=6, do_sample=False))
            lines = _kernels(built)
    assert torch.equal(*outs)
    assert all("fails at one new token" in line for line in lines)


def test_an_artifact_shows_the_same_kernels_whatever_a_check_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared on load, on a machine where the check may say something else; nothing is checked for it."""
    from types import SimpleNamespace

    from tiny import tiny_config

    from kvcompile.adapters.architectures import describe as plan_of
    from kvcompile.artifact import kernel_texts
    from kvcompile.stack import apply_stack, build_stack

    plan = apply_stack(plan_of(tiny_config("llama")), build_stack(["h2o"], {"h2o": {"decode_every": 4}}))
    monkeypatch.setattr(trust, "check", lambda *_: pytest.fail("nothing runs"))
    monkeypatch.setattr(dispatch, "choose", lambda *_: trusted(CPP, CPU))
    model = SimpleNamespace(kvcompile=SimpleNamespace(plan=plan, kernels="auto"), device=CPU)
    assert kernel_texts.of_model(model) == kernel_texts.files(plan, CPP)
