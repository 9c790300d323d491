"""Image retrieval: the authors' numbers, the formula as loops, ties, junk, missing images."""

import pickle

import numpy as np
import pytest
import torch

from triptych.data.retrieval_sets import Wanted, open_retrieval
from triptych.errors import UserError
from triptych.evals.retrieval import (
    PRESETS,
    average_precision,
    bootstrap_interval,
    of_readable,
    ranks_of,
    retrieval,
)


def wanted(positive, junk=()):
    return Wanted(np.array(positive, np.int64), np.array(junk, np.int64))


def with_cosines(similarity):
    """Gallery (M, Q + 1) and queries (Q, Q + 1) of unit length whose cosines are proportional to similarity (M, Q)."""
    rows = similarity.double() / (2 * similarity.double().norm(dim=1).max())
    rest = (1 - rows.square().sum(1, keepdim=True)).sqrt()
    return torch.cat([rows, rest], 1), torch.eye(rows.shape[1], rows.shape[1] + 1, dtype=torch.float64)


def random_case(gallery=40, queries=7, seed=0):
    rng = np.random.default_rng(seed)
    x, y = torch.randn(gallery, 5, generator=torch.manual_seed(seed)), torch.randn(queries, 5)
    truth = [wanted(*np.split(rng.permutation(gallery)[:12], [5])) for _ in range(queries)]
    return x, y, {"all": truth}


def test_easy_medium_and_hard_are_those_of_the_authors(golden, tmp_path):
    """From a file as published to the mAP, AP and mP@k that the benchmark's script gives for the same similarities."""
    g = golden("retrieval_map")
    label = g["label_0none_1easy_2hard_3junk"].numpy()
    images, queries = label.shape
    names, asked = [f"g{i}" for i in range(images)], [f"q{i}" for i in range(queries)]
    gnd = [
        {"bbx": [0.0, 0.0, 1.0, 1.0]}
        | {key: np.flatnonzero(label[:, q] == kind) for kind, key in enumerate(("easy", "hard", "junk"), 1)}
        for q in range(queries)
    ]
    (tmp_path / "jpg").mkdir()
    for name in names + asked:
        (tmp_path / "jpg" / f"{name}.jpg").touch()
    file = tmp_path / "gnd_toy.pkl"
    file.write_bytes(pickle.dumps({"imlist": names, "qimlist": asked, "gnd": gnd}))
    (toy,) = open_retrieval(file)
    ks = g["kappas"].tolist()
    result = retrieval(*with_cosines(g["similarity"]), toy.truth, ks=ks)
    assert (result.gallery_images, result.query_images) == (images, queries)
    for setting in ("easy", "medium", "hard"):
        scores = result.scores[setting]
        assert scores.mean_ap == pytest.approx(100 * float(g[f"{setting}_map"]), abs=1e-9)
        expected = [None if np.isnan(x) else pytest.approx(100 * x, abs=1e-9) for x in g[f"{setting}_ap"].tolist()]
        assert list(scores.ap) == expected
        assert scores.skipped == expected.count(None)
        assert [scores.precision_at[k] for k in ks] == pytest.approx((100 * g[f"{setting}_mp_at_k"]).tolist(), abs=1e-9)
    assert result.scores["hard"].skipped == 1, "the golden table has a query without hard images"


def test_average_precision_is_the_area_under_the_trapezoids():
    ranking = [1, 0, 1, 1, 0, 0, 1, 0]  # relevant?
    area, found = 0.0, 0
    for rank, relevant in enumerate(ranking):
        if relevant:
            before = found / rank if rank else 1.0
            found += 1
            area += (before + found / (rank + 1)) / 2 / 4
    assert average_precision(np.flatnonzero(ranking), 4) == pytest.approx(100 * area)
    assert average_precision(np.array([0, 1]), 2) == 100
    assert average_precision(np.array([], np.int64), 3) == 0


def test_junk_counts_as_if_it_were_not_in_the_gallery():
    x, y, truth = random_case()
    result = retrieval(x, y, truth).scores["all"]
    for q, (positive, junk) in enumerate(truth["all"]):
        kept = np.setdiff1d(np.arange(len(x)), junk)
        alone = retrieval(x[kept], y[q : q + 1], {"all": [wanted(np.searchsorted(kept, positive))]})
        assert result.ap[q] == pytest.approx(alone.scores["all"].mean_ap)
    assert result.mean_ap == pytest.approx(np.mean(result.ap))


def test_an_image_that_is_both_wanted_and_junk_is_junk():
    assert ranks_of(np.array([2, 0, 1, 3]), wanted([0, 1, 3], [1])).tolist() == [1, 2]


def test_precision_at_k_stops_at_the_last_positive():
    x = torch.eye(4)[[0, 1, 2, 3]]
    y = torch.tensor([[4.0, 3.0, 2.0, 1.0]])  # ranks the images in their order
    scores = retrieval(x, y, {"all": [wanted([0, 2])]}, ks=(1, 2, 3, 10)).scores["all"]
    assert scores.precision_at == {1: 100, 2: 50, 3: pytest.approx(200 / 3), 10: pytest.approx(200 / 3)}


def test_equal_similarities_rank_by_the_lower_index():
    x, y = torch.ones(50, 3), torch.ones(1, 3)
    for position in (0, 7, 49):
        (ap,) = retrieval(x, y, {"all": [wanted([position])]}).scores["all"].ap
        assert ap == pytest.approx(average_precision(np.array([position]), 1))


def test_length_of_features_and_size_of_chunks_do_not_matter():
    x, y, truth = random_case()
    result = retrieval(x, y, truth, memory_mb=0)  # one query and one gallery image at a time
    assert retrieval(x * torch.rand(len(x), 1).add(0.1), 3 * y, truth) == result
    assert retrieval(x.double(), y.double(), truth).scores["all"].ap == pytest.approx(result.scores["all"].ap)


def test_images_that_cannot_be_read_are_no_part_of_the_truth():
    x, y, truth = random_case()
    truth["all"] = [wanted([*w.positive, 3], [*w.junk, 4]) for w in truth["all"]]
    readable, asked = torch.tensor([i for i in range(len(x)) if i not in (3, 4)]), torch.tensor([0, 2, 5])
    result = retrieval(x[readable], y[asked], of_readable(truth, readable, asked)).scores["all"]
    as_junk = {"all": [wanted(w.positive, [*w.junk, 3]) for w in truth["all"]]}
    expected = retrieval(x, y, as_junk).scores["all"].ap
    assert result.ap == pytest.approx([expected[i] for i in asked])


def test_queries_of_one_class_go_on_sharing_their_positives():
    shared = np.arange(5)
    renumbered = of_readable(
        {"all": [Wanted(shared, np.array([q])) for q in range(3)]}, torch.arange(1, 6), torch.arange(3)
    )
    assert renumbered["all"][0].positive is renumbered["all"][2].positive
    assert renumbered["all"][0].positive.tolist() == [0, 1, 2, 3]
    assert [w.junk.tolist() for w in renumbered["all"]] == [[], [0], [1]]


def test_the_interval_is_that_of_a_mean_and_comes_of_the_seed():
    values = np.random.default_rng(0).normal(50, 10, 400).tolist()
    low, high = bootstrap_interval(values, 0)
    error = np.std(values) / 400**0.5
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.2 * error)
    assert (low, high) == bootstrap_interval(values, 0) != bootstrap_interval(values, 1)


def test_presets_are_the_papers_commands():
    dino, ibot = PRESETS["dino"], PRESETS["ibot"]
    assert (dino["roxford5k"].size, dino["roxford5k"].scales) == (224, (1.0,))
    assert dino["rparis6k"] == ibot["rparis6k"] == ibot["roxford5k"]
    assert dino["rparis6k"].size == 512
    assert dino["rparis6k"].scales == pytest.approx((1, 2**-0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y, t: (x[:0], y, t), "gallery features have shape"),
        (lambda x, y, t: (x, y * float("nan"), t), "7 of 7 query features hold NaN"),
        (lambda x, y, t: (x, y[:, :2], t), "same encoder"),
        (lambda x, y, t: (x[:-20], y, t), "of_readable"),
        (lambda x, y, t: (x, y[:3], t), "7 queries"),
        (lambda x, y, t: (x, y, {"hard": [wanted([])] * len(y)}), "no query has a positive .hard"),
    ],
)
def test_bad_input_is_told(change, text):
    with pytest.raises(UserError, match=text):
        retrieval(*change(*random_case()))
    with pytest.raises(UserError, match="each >= 1"):
        retrieval(*random_case(), ks=(0,))
