"""Nearest rows: those of a full stable sort, whatever the features, within the memory given."""

import math

import pytest
import torch

from triptych.evals.neighbours import NOTHING, index, key, nearest, similarity
from triptych.memory import LiveMemory


def corners(images: int, *, seed=0):
    """Features (images, 16) of four entries +-1/2: norms and cosines are exact, and most of them are equal."""
    features = torch.zeros(images, 16)
    features[:, :4] = torch.randint(2, (images, 4), generator=torch.Generator().manual_seed(seed)) - 0.5
    return features


def sets_of(kind: str, *, bank: int, asked: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Train and test features.  ever nearer: to the first test row; corners, all equal: products without rounding."""
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(bank, width, generator=g), torch.randn(asked, width, generator=g)
    if kind == "ever nearer":
        train = torch.lerp(train, test[:1], torch.linspace(0, 0.99, bank)[:, None])
    if kind == "corners":
        train, test = corners(bank), corners(asked, seed=1)
    if kind == "all equal":
        train, test = corners(1).expand(bank, -1), corners(asked, seed=1)
    return train, test


KINDS = ["random", "ever nearer", "corners", "all equal"]
BANKS = [(1, 1), (5, 3), (16, 16), (17, 17), (100, 7), (999, 999), (1000, 200), (20_000, 1), (20_000, 20)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_is_held_whatever_the_features(kind):
    train, test = sets_of(kind, bank=5000, asked=200)
    for joints in ([[0]], [[0], [0, 1], [1, 0]]):
        for memory_mb in (4, 16):
            with LiveMemory() as memory:
                for _ in nearest([train, train], [test, test], 100, joints=joints, memory_mb=memory_mb):
                    pass
            assert memory.peak <= memory_mb * 2**20


@pytest.mark.parametrize(("bank", "k"), BANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_those_of_a_full_stable_sort(bank, k, kind):
    train, test = sets_of(kind, bank=bank, asked=30)
    all_s = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    s, order = torch.sort(all_s, dim=1, descending=True, stable=True)
    for memory_mb in (1, 512):
        keys = torch.cat([keys[0] for _, keys in nearest([train], [test], k, memory_mb=memory_mb)])
        at = index(keys)
        assert all(len(set(row)) == k for row in at.tolist())
        for found in (similarity(keys), all_s.gather(1, at)):
            torch.testing.assert_close(found, s[:, :k], rtol=0, atol=3e-7)  # products of other shapes round differently
        if kind in ("corners", "all equal"):
            assert torch.equal(at, order[:, :k])


@pytest.mark.parametrize("memory_mb", [1, 64])
@pytest.mark.parametrize("joints", [[[0], [2], [0, 2], [2, 1, 0]], [[0, 1, 2]], [[1]]])
def test_spaces_looked_at_together_are_features_of_unit_length_side_by_side(joints, memory_mb):
    spaces = [sets_of("random", bank=3000, asked=40, width=width) for width in (8, 5, 12)]
    bank, test = ([one[i] for one in spaces] for i in (0, 1))
    found = [keys for _, keys in nearest(bank, test, 10, joints=joints, memory_mb=memory_mb)]
    for joint, keys in zip(joints, torch.cat(found, 1), strict=True):
        unit = [torch.cat([torch.nn.functional.normalize(x[i]) for i in joint], 1) for x in (bank, test)]
        s = unit[1] @ unit[0].T / len(joint)
        for values in (similarity(keys), s.gather(1, index(keys))):
            torch.testing.assert_close(values, s.topk(10).values, rtol=0, atol=3e-7)


def test_keys_sort_by_similarity_and_then_by_the_lowerindex():
    s = torch.tensor([-math.inf, -1.0, -0.25, -0.0, 0.0, 1e-30, 0.25, 1.0])
    for column in (torch.arange(8), torch.arange(8).flip(0)):
        keys = key(s, column)
        assert keys.argsort().tolist() == ([0, 1, 2, 4, 3, 5, 6, 7] if column[0] == 0 else list(range(8)))
        assert torch.equal(similarity(keys), s)
        assert torch.equal(index(keys), column)
        assert (keys > NOTHING).all()
    assert similarity(torch.tensor([NOTHING])).item() == -math.inf
