"""Policies of two tiers: what their plans say, and what is refused."""

from __future__ import annotations

import pytest
import torch
from contract_table import dense, plan_of

from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.supports import refuse
from kvcompile.plan.selection import LayerScores, Tiers
from kvcompile.plan.storage import Codec, Storage
from kvcompile.runtime.selection import high_counts

K8V4, K4V2 = (Codec("int8", "token"), Codec("int4", "token")), (Codec("int4", "token"), Codec("int2", "token"))


def test_a_row_of_two_tiers_has_the_bytes_of_both() -> None:
    """The paper's numbers for heads of 128: 192 and 96 bytes, and four float16 numbers a token in either."""
    storage = Storage(*K8V4, low=K4V2)
    assert storage.nbytes(10, 128, "bfloat16") == 10 * (192 + 8)
    assert storage.nbytes(10, 128, "bfloat16", low=7) == 3 * (192 + 8) + 7 * (96 + 8)
    assert storage.text("bfloat16") == "K int8t, V int4t or K int4t, V int2t"


def test_a_share_is_planned_and_a_threshold_is_not() -> None:
    share = plan_of({"snapkv": {"budget": 40, "window": 4}, "tiers": {"share": 0.25, "recent": 4}})
    assert share.bytes(1, 100)[0].low == (30, 30)
    assert share.bytes(1, 100)[0].bytes == 2 * sum(share.layers[0].nbytes(n, "float32", low) for n, low in [(40, 30)])
    assert plan_of({"leankv": {}}).bytes(1, 100)[0].low is None


@pytest.mark.parametrize(("tiers", "counts"), [(Tiers(share=0.5), [2, 1]), (Tiers(alpha=2.0), [2, 1])])
def test_how_many_are_high(tiers: Tiers, counts: list[int]) -> None:
    """Half of what is kept, or what reaches 2 / n; never more than is kept, and the protected ones in any case."""
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.2], [float("inf"), 0.1, 0.1, 0.9]])
    layer = LayerScores(scores, None, torch.tensor([4, 4]), 4, 1, newest=7)
    assert high_counts(tiers, layer, torch.tensor([4, 1])).tolist() == counts


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"leankv": {"alpha_low": 2.0}}, "alpha_low must be in"),
        ({"leankv": {"recent": 65}}, "recent must be 1 to 64"),
        ({"leankv": {"high": [8]}}, "high must be two of"),
        ({"tiers": {"alpha_high": 1.0}}, "alpha_low must be given with alpha_high"),
        ({"tiers": {"alpha_high": 1.0, "alpha_low": 0.1, "budget": 0.5}}, "budget must be null"),
        ({"snapkv": {}, "tiers": {"score": "h2o"}}, "only one score"),
        ({"snapkv": {}, "leankv": {}}, "drop it"),
        ({"leankv": {}, "kivi": {}}, "only one number format"),
        ({"leankv": {}, "paged": {}}, "one stretch of memory"),
    ],
)
def test_what_cannot_be_is_refused(stack: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        plan_of(stack).check()


def test_programs_of_fixed_shape_hold_one_precision() -> None:
    with pytest.raises(KvcompileError, match="one precision"):
        refuse(plan_of({"tiers": {"recent": 4}}), dense().config)
