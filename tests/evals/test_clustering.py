"""Agreement of clusters and classes: golden numbers, definitions as loops; k-means that labels do not steer."""

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch

from triptych.errors import UserError
from triptych.evals import clustering as module
from triptych.evals.clustering import MEASURES, cluster_metrics, clustering, nmi


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def separate(images=60, classes=4, width=8, noise=0.1):
    """Features (images, width) in clear clusters by label, of very unlike lengths, and the labels."""
    labels = torch.arange(images) % classes
    x = draw(classes, width, seed=5)[labels] + noise * draw(images, width)
    return x * draw(images, 1, seed=2).exp() * 10, labels


def test_metrics_equal_the_golden_numbers(golden):
    g = golden("cluster_metrics")
    ours = cluster_metrics(g["truth"], g["pred"])
    assert ours.nmi == pytest.approx(float(g["nmi_arithmetic"]), abs=1e-12)
    assert ours.ari == pytest.approx(float(g["ari"]), abs=1e-12)
    assert ours.fowlkes_mallows == pytest.approx(float(g["fowlkes_mallows"]), abs=1e-12)
    assert ours.accuracy == pytest.approx(100 * float(g["best_match_accuracy"]), abs=1e-10)
    assert (ours.images, ours.classes, ours.clusters) == (120, 5, 5)
    more = cluster_metrics(g["truth"], g["pred_more"])
    assert more.nmi == pytest.approx(float(g["nmi_more"]), abs=1e-12)


def test_nmi_equals_the_golden_numbers(golden):
    g = golden("cluster_metrics")
    assert nmi(g["truth"], g["pred"]) == pytest.approx(float(g["nmi_arithmetic"]), abs=1e-12)
    assert nmi(g["truth"], g["pred_more"]) == pytest.approx(float(g["nmi_more"]), abs=1e-12)


def test_nmi_equals_its_definition_written_as_loops(golden):
    g = golden("cluster_metrics")
    a, b = g["truth"].tolist(), g["pred"].tolist()
    n, information = len(a), 0.0
    for i in set(a):
        for j in set(b):
            both = sum(x == i and y == j for x, y in zip(a, b, strict=True)) / n
            if both:
                information += both * math.log(both / (a.count(i) / n * b.count(j) / n))
    entropy = [-sum(x.count(i) / n * math.log(x.count(i) / n) for i in set(x)) for x in (a, b)]
    assert nmi(g["truth"], g["pred"]) == pytest.approx(2 * information / sum(entropy), abs=1e-12)


def test_nmi_does_not_see_the_names_of_the_clusters(golden):
    g = golden("cluster_metrics")
    renamed = torch.tensor([31, 4, 15, 9, 2])[g["pred"]]
    assert nmi(g["truth"], renamed) == pytest.approx(nmi(g["truth"], g["pred"]), abs=1e-12)
    assert nmi(renamed, g["pred"]) == pytest.approx(1)
    assert nmi(g["truth"], torch.zeros_like(renamed)) == 0


def test_the_pair_measures_equal_their_definitions_written_as_loops(golden):
    g = golden("cluster_metrics")
    a, b = g["truth"].tolist()[:40], g["pred_more"].tolist()[:40]
    both = only_a = only_b = neither = 0
    for i, j in itertools.combinations(range(40), 2):
        together = a[i] == a[j], b[i] == b[j]
        both += together == (True, True)
        only_a += together == (True, False)
        only_b += together == (False, True)
        neither += together == (False, False)
    pairs = both + only_a + only_b + neither
    by_chance = (both + only_a) * (both + only_b) / pairs
    largest = ((both + only_a) + (both + only_b)) / 2
    ours = cluster_metrics(torch.tensor(a), torch.tensor(b))
    assert ours.fowlkes_mallows == pytest.approx(both / math.sqrt((both + only_a) * (both + only_b)), abs=1e-12)
    assert ours.ari == pytest.approx((both - by_chance) / (largest - by_chance), abs=1e-12)


@pytest.mark.parametrize(("classes", "clusters"), [(4, 4), (3, 6), (5, 3), (4, 1)])
def test_accuracy_is_that_of_the_best_of_all_one_to_one_matchings(classes, clusters):
    g = torch.Generator().manual_seed(clusters)
    truth, found = torch.arange(50) % classes, torch.randint(clusters, (50,), generator=g)
    spare = clusters + classes  # a class may be matched with a cluster that holds nothing
    best = max(
        sum(found[truth == c].eq(partner[c]).sum().item() for c in range(classes))
        for partner in itertools.permutations(range(spare), classes)
    )
    assert cluster_metrics(truth, found).accuracy == pytest.approx(100 * best / 50)


def test_clusters_without_a_class_of_their_own_count_as_wrong():
    truth = torch.tensor([0, 0, 0, 0, 1, 1])
    assert cluster_metrics(truth, torch.tensor([7, 7, 7, 3, 9, 9])).accuracy == pytest.approx(100 * 5 / 6)
    alone = cluster_metrics(truth, torch.arange(6))
    assert alone.accuracy == pytest.approx(100 * 2 / 6), "one image of each class"
    assert alone.clusters == 6


def test_classes_that_share_all_their_clusters_stay_alone_but_for_one():
    """Classes 0 and 1 lie in cluster 0 together: no matching gives every class a cluster that it has."""
    truth, found = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 0, 1, 2])
    assert cluster_metrics(truth, found).accuracy == pytest.approx(100 * (3 + 0 + 1) / 7)


def test_accuracy_of_ids_up_to_a_million_needs_no_table_of_them():
    truth, found = torch.arange(3000) % 1000, torch.arange(3000) * 400_000
    assert cluster_metrics(truth, found).accuracy == pytest.approx(100 / 3)


def test_clear_clusters_are_found_whatever_the_lengths_of_the_features():
    x, labels = separate()
    result = clustering(x, labels, restarts=5)
    assert result.metrics.accuracy == 100
    assert result.metrics.nmi == pytest.approx(1)
    assert result.shuffled.accuracy < 60
    assert result.asked_clusters == result.metrics.clusters == 4, "as many as there are classes"
    assert result.algorithm == "k-means"
    assert json.loads(json.dumps(asdict(result), allow_nan=False)) == asdict(result)


def test_inertia_is_the_mean_squared_distance_to_the_centre_of_the_cluster():
    x, labels = separate(noise=0.6)
    result = clustering(x, labels, clusters=2, restarts=3)
    units = [v / v.norm() for v in x]

    def spread(of):
        total = 0.0
        for c in set(of):
            rows = torch.stack([u for u, k in zip(units, of, strict=True) if k == c])
            total += (rows - rows.mean(0)).square().sum().item()
        return total / len(units)

    _, found = min((module._k_means(torch.stack(units).numpy(), 2, s, True) for s in range(3)), key=lambda r: r[0])
    assert result.inertia == pytest.approx(spread(found.tolist()), rel=1e-5)


def test_the_start_of_least_inertia_is_reported_and_labels_have_no_say(monkeypatch):
    truth = torch.tensor([0, 0, 1, 1])
    starts = [(3.0, [0, 0, 1, 1]), (1.0, [0, 1, 0, 1]), (2.0, [0, 0, 0, 1])]
    starts = [(inertia, torch.tensor(found).numpy()) for inertia, found in starts]
    monkeypatch.setattr(module, "_k_means", lambda points, clusters, seed, exact: starts[seed - 7])
    result = clustering(draw(4, 3), truth, restarts=3, seed=7)
    assert result.inertia == pytest.approx(1 / 4)
    assert result.metrics == cluster_metrics(truth, torch.tensor([0, 1, 0, 1]))
    each = [cluster_metrics(truth, torch.tensor(found)) for _, found in starts]
    for name in MEASURES:
        values = [getattr(m, name) for m in each]
        mean = sum(values) / 3
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        assert result.mean[name] == pytest.approx(mean)
        assert result.margin[name] == pytest.approx(4.302652730 * deviation / math.sqrt(3))  # t with 2 degrees


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    x, labels = draw(300, 6), torch.arange(300) % 7
    first = clustering(x, labels, restarts=1)
    assert first == clustering(x.clone(), labels, restarts=1)
    assert first.inertia != clustering(x, labels, restarts=1, seed=1).inertia
    assert set(first.margin.values()) == {None}, "one start has no spread"


def test_shuffled_labels_show_what_many_clusters_score_by_chance():
    result = clustering(draw(200, 6), torch.arange(200) % 10, clusters=100, restarts=1)
    assert result.shuffled.nmi > 0.4, "NMI is high with two images a cluster, whatever they show"
    assert abs(result.shuffled.ari) < 0.05, "ARI is not"
    assert result.metrics.nmi == pytest.approx(result.shuffled.nmi, abs=0.05), "random features know no more"
    assert result.shuffled.clusters == result.metrics.clusters == 100


def test_large_sets_are_clustered_in_mini_batches_and_the_result_says_so(monkeypatch):
    x, labels = separate(400)
    monkeypatch.setattr(module, "EXACT", 400 * 4 - 1)
    result = clustering(x, labels, restarts=3)
    assert result.algorithm == "mini-batch k-means"
    assert result.metrics.accuracy == 100
    monkeypatch.setattr(module, "EXACT", 400 * 4)
    assert clustering(x, labels, restarts=1).algorithm == "k-means"


def test_the_features_given_stay_as_they_are():
    x, labels = separate()
    before = x.clone()
    clustering(x, labels, restarts=1)
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_a_collapsed_encoder_has_one_cluster_that_tells_nothing():
    result = clustering(torch.ones(20, 4), torch.arange(20) % 2, restarts=1)
    assert result.metrics.clusters == 1
    assert result.metrics.nmi == 0
    assert result.metrics.accuracy == 50


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": torch.zeros(60)}, r"shape \(60,\)"),
        ({"features": torch.full((60, 2), torch.inf)}, "60 of 60 features hold NaN"),
        ({"labels": torch.zeros(59, dtype=torch.int64)}, "each of the 60 images"),
        ({"labels": torch.zeros(60)}, "type torch.float32"),
        ({"labels": torch.full((60,), -1)}, "id >= 0"),
        ({"clusters": 61}, "61 clusters of 60 images"),
        ({"clusters": 1}, "1 clusters"),
        ({"labels": torch.zeros(60, dtype=torch.int64)}, "1 clusters"),
        ({"restarts": 0}, "restarts is 0"),
    ],
)
def test_what_does_not_fit_is_said(change, says):
    x, labels = separate()
    with pytest.raises(UserError, match=says):
        clustering(**{"features": x, "labels": labels} | change)


def test_labellings_of_unlike_images_are_no_pair():
    with pytest.raises(UserError, match="each of the 4 images"):
        cluster_metrics(torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
