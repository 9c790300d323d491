"""Weighted k-NN: the equation as loops, and the votes and accuracies of the DINO and UDI scripts."""

import math

import pytest
import torch

from triptych.errors import UserError
from triptych.evals.knn import DEFAULT_K, check_sets, knn, knn_votes, label_rank
from triptych.evals.neighbours import Sizes
from triptych.memory import LiveMemory

GOLDEN_K = (1, 5, 10, 20, 50, 100, 200)


def blobs(images: int, *, classes=7, width=12, seed=0):
    """Features (images, width) that cluster by label, and the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=g)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(images, width, generator=g), labels


def corners(images: int, *, seed=0):
    """Features (images, 16) of four entries +-1/2: norms and cosines are exact, and most of them are equal."""
    g = torch.Generator().manual_seed(seed)
    features = torch.zeros(images, 16)
    features[:, :4] = torch.randint(2, (images, 4), generator=g) - 0.5
    return features, torch.randint(9, (images,), generator=g)


@pytest.mark.parametrize("k", GOLDEN_K)
def test_votes_equal_the_authors(golden, k):
    g = golden("knn_vote")
    votes = knn_votes(g["train_feat"], g["train_label"], g["test_feat"], k=k)
    # The file is float32 from features of norm 1 +- 1e-7, and 1 / 0.07 multiplies: exact arithmetic is 3e-6 off it too.
    torch.testing.assert_close(votes, g[f"votes_k{k}"].double(), rtol=5e-6, atol=0)


def test_accuracies_equal_the_authors(golden):
    g = golden("knn_vote")
    sets = g["train_feat"], g["train_label"], g["test_feat"], g["test_label"]
    result = knn(*sets, k=GOLDEN_K)
    assert result.top1 == pytest.approx({k: float(g[f"top1_k{k}"]) for k in GOLDEN_K}, abs=1e-9)
    assert result.top5 == pytest.approx({k: float(g[f"top5_k{k}"]) for k in GOLDEN_K}, abs=1e-9)
    assert (result.train_images, result.test_images, result.classes) == (700, 200, 13)
    for temperature, name in ((0.04, "T4"), (0.10, "T10")):
        top1 = knn(*sets, k=[20], temperature=temperature).top1[20]
        assert top1 == pytest.approx(float(g[f"top1_k20_{name}"]), abs=1e-9)


def test_accuracies_equal_those_of_the_udi_script(golden):
    g = golden("udi_knn")
    ks = g["k"].tolist()
    result = knn(g["train_feat"], g["train_label"], g["test_feat"], g["test_label"], k=ks)
    assert [result.top1[k] for k in ks] == pytest.approx(g["top1"].tolist(), abs=1e-9)
    assert [result.top5[k] for k in ks] == pytest.approx(g["top5"].tolist(), abs=1e-9)


def test_votes_equal_the_equation_written_as_loops():
    (train, labels), (test, _) = blobs(40), blobs(6, seed=1)
    k, temperature = 5, 0.07

    def cosine(a, b):
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms

    votes = knn_votes(train, labels, test, k=k, temperature=temperature)
    for row, query in zip(votes, test.tolist(), strict=True):
        expected = [0.0] * int(labels.max() + 1)
        similar = sorted(((cosine(query, x), y) for x, y in zip(train.tolist(), labels.tolist(), strict=True)))
        for s, y in similar[-k:]:
            expected[y] += math.exp(s / temperature)
        assert row.tolist() == pytest.approx(expected, rel=2e-5)


def test_rank_counts_the_classes_ahead_and_nan_never_wins():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [math.nan, 1.0, 2.0], [math.nan] * 3])
    assert label_rank(scores, torch.tensor([2, 1, 2, 0])).tolist() == [1, 1, 1, 3]
    stacked = torch.stack([scores, -scores], dim=1)
    assert label_rank(stacked, torch.tensor([2, 1, 2, 0])).tolist() == [[1, 1], [1, 1], [1, 2], [3, 3]]


def test_little_memory_changes_nothing():
    train, labels = corners(5000)
    test, test_labels = corners(200, seed=1)
    sizes = Sizes.of(5000, 200, [16], [[0]], 200, 1)
    assert sizes.rows < sizes.searched < 200, "1 MiB must cut the test set"
    assert sizes.width < 5000 / 2, "1 MiB must cut the bank"
    small, large = (knn_votes(train, labels, test, k=200, memory_mb=mb) for mb in (1, 4096))
    assert torch.equal(small, large)
    small, large = (knn(train, labels, test, test_labels, memory_mb=mb) for mb in (1, 4096))
    assert small == large


def test_votes_count_towards_the_memory():
    (train, labels), (test, test_labels) = blobs(3000, classes=400), blobs(1000, classes=400, seed=1)
    with LiveMemory() as memory:
        knn(train, labels, test, test_labels, memory_mb=8)
    assert memory.peak <= 8 * 2**20


def test_equal_similarities_go_to_the_lower_index():
    train, labels = corners(3000)
    test, _ = corners(40, seed=1)
    unit = train / train.norm(dim=1, keepdim=True)
    order = torch.sort(test @ unit.T, dim=1, descending=True, stable=True)  # +-1/2 fourfold: unit length already
    for k in (1, 7, 150):
        weight, label = (order.values[:, :k].double() / 0.07).exp(), labels[order.indices[:, :k]]
        expected = torch.zeros(40, 9, dtype=torch.float64).scatter_add_(1, label, weight)
        for memory_mb in (1, 512):
            torch.testing.assert_close(knn_votes(train, labels, test, k=k, memory_mb=memory_mb), expected)


def test_a_k_is_not_changed_by_the_others():
    sets = *blobs(300), *blobs(150, seed=1)
    together = knn(*sets, k=[100, 3, 10])
    assert list(together.top1) == [3, 10, 100]
    for k in together.top1:
        alone = knn(*sets, k=[k])
        assert (together.top1[k], together.top5[k]) == (alone.top1[k], alone.top5[k])


@pytest.mark.parametrize("images", [1, 3, 99])
def test_fewer_than_100_test_images_work(images):
    result = knn(*blobs(60), *blobs(images, seed=1), k=[1, 10])
    assert result.test_images == images
    assert all(0 <= result.top1[k] <= result.top5[k] <= 100 for k in (1, 10))


def test_scale_of_features_and_a_low_temperature_do_not_matter():
    (train, labels), (test, test_labels) = blobs(200), blobs(50, seed=1)
    plain = knn(train, labels, test, test_labels, k=[1])
    assert knn(train * 7, labels, test / 100, test_labels, k=[1]) == plain
    cold = knn(train, labels, test, test_labels, k=[1, 20], temperature=1e-4)
    assert cold.top1[20] == plain.top1[1], "as T goes to 0 the nearest neighbour decides"


def test_labels_may_have_gaps_and_classes_of_one_side():
    train, test = torch.eye(3), torch.eye(3)
    result = knn(train, torch.tensor([0, 5, 9]), test, torch.tensor([0, 5, 12]), k=[1])
    assert result.classes == 13
    assert result.top1[1] == pytest.approx(200 / 3)


def test_the_default_k_are_those_that_fit():
    test = blobs(20, seed=1)
    assert tuple(knn(*blobs(250), *test).top1) == DEFAULT_K
    assert tuple(knn(*blobs(60), *test).top1) == (10, 20)
    assert tuple(knn(*blobs(4), *test).top1) == (4,)


def test_half_precision_banks_give_nearly_the_same():
    (train, labels), (test, _) = blobs(200), blobs(20, seed=1)
    votes = knn_votes(train, labels, test, k=200)
    torch.testing.assert_close(knn_votes(train.half(), labels, test.half(), k=200), votes, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": [10, 300]}, "300 neighbours asked of 50"),
        ({"k": [0, 5]}, "each >= 1"),
        ({"k": []}, "at least one k"),
        ({"temperature": 0.0}, "temperature"),
        ({"train": torch.zeros(0, 12), "train_labels": torch.zeros(0, dtype=torch.int64)}, "at least one image"),
        ({"test": torch.zeros(9, 5)}, "12 numbers per image, test features 5"),
        ({"train_labels": torch.zeros(49, dtype=torch.int64)}, "each of the 50 images"),
        ({"train_labels": torch.zeros(50)}, "integer class id"),
        ({"test_labels": torch.full((9,), -1)}, ">= 0"),
    ],
)
def test_bad_input_is_named(change, words):
    train, test = blobs(50), blobs(9, seed=1)
    given = {"train": train[0], "train_labels": train[1], "test": test[0], "test_labels": test[1], **change}
    with pytest.raises(UserError, match=words):
        knn(**given)


def test_rows_that_are_not_finite_are_counted():
    train, labels = blobs(50)
    train[3, 2], train[7, 0], train[7, 1] = math.nan, math.inf, -math.inf
    with pytest.raises(UserError, match="2 of 50 train features"):
        check_sets(train, labels, *blobs(9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_accuracies():
    sets = *blobs(3000), *blobs(500, seed=1)
    assert knn(*(x.cuda() for x in sets)) == knn(*sets)
