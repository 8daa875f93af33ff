"""k-means over keys: every key in one cluster, no cluster lost or twice, and a row alone is what it is in a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvcompile.recall import kmeans, stretches

ROWS, TOKENS, DIM, COUNT = 3, 200, 16, 9


def keys_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(clusters: kmeans.Clusters) -> Tensor:
    """The cluster of each key, `[R, n]`."""
    rows, count = clusters.sizes.shape
    ranked = torch.arange(count).repeat(rows).repeat_interleave(clusters.sizes.flatten()).view(rows, -1)
    return torch.empty_like(ranked).scatter_(1, clusters.order, ranked)


def blobs(directions: int, each: int, rows: int = ROWS) -> Tensor:
    """Keys that repeat: `each` copies of some directions, of different lengths."""
    ways = keys_of(rows, directions, DIM).repeat(1, each, 1)
    return ways * torch.linspace(0.5, 2, directions * each).view(1, -1, 1)


def test_every_key_is_in_one_cluster_whose_mean_is_theirs() -> None:
    keys = keys_of(ROWS, TOKENS, DIM)
    found = kmeans.cluster(keys, COUNT)
    assert torch.equal(found.order.sort(1).values, torch.arange(TOKENS).expand(ROWS, -1))
    assert found.sizes.sum(1).tolist() == [TOKENS] * ROWS
    labels = labels_of(found)
    for r in range(ROWS):
        for c in range(COUNT):
            torch.testing.assert_close(found.means[r, c], keys[r, labels[r] == c].mean(0))


def test_those_nearest_the_mean_come_first() -> None:
    keys = keys_of(ROWS, TOKENS, DIM)
    found = kmeans.cluster(keys, COUNT)
    for r in range(ROWS):
        for part, mean in zip(found.order[r].split(found.sizes[r].tolist()), found.means[r], strict=True):
            near = cosine_similarity(keys[r, part], mean.unsqueeze(0), dim=-1)
            assert (near.diff() <= 1e-6).all()


def test_a_few_rounds_bring_keys_nearer_to_their_centers(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(ROWS, 2000, DIM) + 3 * keys_of(ROWS, 10, DIM, seed=1).repeat_interleave(200, 1)

    def nearness() -> float:
        found = kmeans.cluster(keys, 25)
        own = found.means.gather(1, labels_of(found).unsqueeze(-1).expand_as(keys))
        return float(cosine_similarity(keys, own, dim=-1).mean())

    after = nearness()
    monkeypatch.setattr(kmeans, "ROUNDS", 0)
    assert after > nearness() + 0.003


@pytest.mark.parametrize(("directions", "each"), [(5, 40), (9, 25), (40, 5), (3, 100)])
def test_keys_that_repeat_make_no_center_twice(directions: int, each: int) -> None:
    """As many clusters as there are directions, up to the count; in each only what points one way where that fits."""
    keys = blobs(directions, each)
    found = kmeans.cluster(keys, COUNT)
    assert ((found.sizes > 0).sum(1) == min(directions, COUNT)).all()
    for means, sizes in zip(normalize(found.means, dim=-1), found.sizes, strict=True):
        real = means[sizes > 0]
        alike = real @ real.T - torch.eye(len(real))
        assert float(alike.max()) < 1 - 1e-4
    labels = labels_of(found)
    assert all(len(labels[r, way::directions].unique()) == 1 for r in range(ROWS) for way in range(directions))


def test_an_empty_cluster_gets_the_farthest_key_of_another() -> None:
    unit = normalize(torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [-1, 0.2], [-1, 0]]]), dim=-1)
    centers = torch.tensor([[[1.0, 0], [0, -1], [-1, 0]]])
    labels = torch.tensor([[0, 0, 0, 2, 2]])
    moved = kmeans.reseeded(unit, labels, centers)
    assert torch.equal(moved[0, 1], unit[0, 2]), "the key at a right angle to its center"
    assert torch.equal(moved[:, ::2], centers[:, ::2])
    assert kmeans.nearest(unit, moved).tolist() == [[0, 0, 1, 2, 2]]


def test_a_key_that_points_where_its_center_does_is_no_seed() -> None:
    unit = normalize(torch.ones(1, 5, DIM), dim=-1)
    centers = torch.stack((unit[:, 0], -unit[:, 0]), 1)
    assert torch.equal(kmeans.reseeded(unit, torch.zeros(1, 5, dtype=torch.long), centers), centers)


def test_what_is_empty_after_the_last_round_is_filled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "ROUNDS", 0)
    assert (kmeans.cluster(blobs(9, 25), COUNT).sizes == 25).all()


def test_of_centers_that_are_alike_the_first_is_taken() -> None:
    keys = normalize(keys_of(1, 50, DIM), dim=-1)
    centers = keys[:, [3, 7, 3, 3]]
    assert set(kmeans.nearest(keys, centers).unique().tolist()) == {0, 1}


@pytest.mark.parametrize("tokens", [30, 320, 1000])
def test_a_row_alone_is_what_it_is_in_a_batch(tokens: int) -> None:
    """And neither the global generator nor the size of the chunks that are scored decides anything."""
    keys = keys_of(8, tokens, DIM)
    together = kmeans.cluster(keys, max(1, tokens // 80))
    torch.manual_seed(7)
    for r in range(8):
        alone = kmeans.cluster(keys[r : r + 1], max(1, tokens // 80))
        assert torch.equal(alone.order[0], together.order[r])
        assert torch.equal(alone.means[0], together.means[r])


def test_chunks_of_scores_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(ROWS, TOKENS, DIM)
    whole = kmeans.cluster(keys, COUNT)
    monkeypatch.setattr(kmeans, "SCORES", 7 * ROWS * COUNT)
    assert torch.equal(kmeans.cluster(keys, COUNT).order, whole.order)


def test_another_seed_begins_elsewhere() -> None:
    keys = keys_of(ROWS, TOKENS, DIM)
    assert not torch.equal(kmeans.cluster(keys, COUNT, 1).order, kmeans.cluster(keys, COUNT, 0).order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_clustered_in_float32(dtype: torch.dtype) -> None:
    keys = (100 * keys_of(ROWS, TOKENS, DIM)).to(dtype)  # sums of 200 such numbers do not fit float16
    found = kmeans.cluster(keys, COUNT)
    assert found.means.dtype == torch.float32
    assert torch.equal(found.order, kmeans.cluster(keys.float(), COUNT).order)
    assert found.means.isfinite().all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_keys_without_a_direction_are_in_a_cluster_too(value: float) -> None:
    keys = keys_of(ROWS, TOKENS, DIM)
    keys[:, ::3] = value
    for some in (keys, torch.full_like(keys, value)):
        found = kmeans.cluster(some, COUNT)
        assert torch.equal(found.order.sort(1).values, torch.arange(TOKENS).expand(ROWS, -1))
        assert not found.means.isnan().any()


def test_stretches_of_whole_units() -> None:
    assert stretches.even(1, 96, 5, 8, torch.device("cpu")).tolist() == [[24, 24, 16, 16, 16]]
    assert stretches.whole_units(torch.tensor([[5, 1, 1, 9], [16, 0, 0, 0]]), 8).tolist() == [
        [8, 0, 0, 8],
        [16, 0, 0, 0],
    ]


def test_the_mean_of_each_stretch() -> None:
    keys = keys_of(2, 6, DIM)
    means = stretches.means(keys, torch.tensor([[2, 0, 4], [1, 5, 0]]))
    torch.testing.assert_close(means[0, 2], keys[0, 2:].mean(0))
    torch.testing.assert_close(means[1, 1], keys[1, 1:].mean(0))
    assert not means[0, 1].any()
    assert not means[1, 2].any()
