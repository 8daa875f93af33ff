"""What KIVI's fields mean in codecs and bytes."""

from __future__ import annotations

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.policies.kivi import KIVI


def test_keys_per_channel_need_whole_groups_and_per_token_none() -> None:
    channel, _ = KIVI(group=32).codecs(64)
    token, value = KIVI(group=32, key_axis="token", residual=5).codecs(64)
    assert (channel.axis, channel.group, channel.bits) == ("channel", 32, 4)
    assert token == value
    assert (token.nbytes(1, 64), channel.nbytes(32, 64)) == (64 // 2 + 2 * 4, 32 * 64 // 2 + 64 * 4)


def test_a_group_never_exceeds_the_head() -> None:
    key, value = KIVI(group=128, key_axis="token", residual=0).codecs(64)
    assert (key.group, value.group) == (64, 64)


@pytest.mark.parametrize("fields", [{"residual": 5}, {"key_axis": "row"}, {"bits": 3}, {"value_bits": 16}])
def test_values_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(KvcompileError, match=rf"stack\.kivi: {next(iter(fields))} must be"):
        KIVI(**fields)
