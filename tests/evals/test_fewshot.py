"""Few-shot episodes and threshold F1: the definition as loops, golden numbers, and what the statistics claim."""

import math

import pytest
import torch
import torch.nn.functional as F

from triptych.errors import UserError
from triptych.evals import fewshot
from triptych.evals.fewshot import f1_score, few_shot, scores


def blobs(counts, *, width=8, noise=1.0, seed=0):
    """counts[c] features of class c, shuffled, and their labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = torch.randn(len(counts), width, generator=g)
    return centres[labels] + noise * torch.randn(len(labels), width, generator=g), labels


def by_class(x, labels, ways):
    """(ways, images of each, D)"""
    return torch.stack([F.normalize(x[labels == c], dim=1) for c in range(ways)])


def test_an_episode_gives_the_golden_accuracy_and_f1(golden):
    g = golden("fewshot_episode")
    support = by_class(g["support"], g["support_label"], 5)[None]
    query = by_class(g["query"], g["query_label"], 5)[None]
    right, true, yes = scores(support, query, g["thresholds"])
    assert right.tolist() == pytest.approx([float(g["accuracy"])])
    for averaging in ("pairs", "episodes"):  # of one episode they are the same
        f1 = f1_score(true.double(), yes.double(), 20, averaging)
        torch.testing.assert_close(f1, 100 * g["f1_pooled_pairs"], rtol=0, atol=1e-9)
        assert float(f1.max()) == pytest.approx(100 * float(g["best_f1"]))


@pytest.mark.parametrize("shots", [1, 3])
def test_scores_are_those_of_loops_over_queries_and_supports(shots):
    g = torch.Generator().manual_seed(0)
    episodes, ways, queries, theta = 4, 3, 5, 0.2
    support = F.normalize(torch.randn(episodes, ways, shots, 6, generator=g).double(), dim=-1)
    query = F.normalize(torch.randn(episodes, ways, queries, 6, generator=g).double() + support[:, :, :1], dim=-1)
    right, true, yes = scores(support, query, torch.tensor([-1.0, theta]))
    for e in range(episodes):
        correct = hits = said = 0
        for c in range(ways):
            for q in query[e, c]:
                means = support[e].mean(1)
                cosines = [float(q @ mean / mean.norm()) for mean in means]
                correct += max(range(ways), key=lambda other: cosines[other]) == c
                for other in range(ways):
                    for s in support[e, other]:
                        said += float(q @ s) > theta
                        hits += float(q @ s) > theta and other == c
        assert float(right[e]) == pytest.approx(correct / (ways * queries))
        assert (int(true[e, 1]), int(yes[e, 1])) == (hits, said)
        assert (int(true[e, 0]), int(yes[e, 0])) == (ways * queries * shots, ways**2 * queries * shots)


def test_f1_is_pooled_over_all_pairs_or_the_mean_over_episodes():
    """Two episodes with 4 pairs of one class: 4 of 4 found by 4 answers, and 1 found by 8."""
    true, yes = torch.tensor([[4.0], [1.0]]), torch.tensor([[4.0], [8.0]])
    assert f1_score(true, yes, 4, "pairs").tolist() == pytest.approx([100 * 2 * 5 / (12 + 8)])
    assert f1_score(true, yes, 4, "episodes").tolist() == pytest.approx([100 * (1 + 2 * 1 / (8 + 4)) / 2])


def drawn(monkeypatch, x, labels, **options):
    """The rows of every episode that `few_shot` draws: features whose first number is their row."""
    seen = []

    def spy(support, query, thresholds):
        seen.append(torch.cat([support, query], 2))
        return scores(support, query, thresholds)

    monkeypatch.setattr(fewshot, "scores", spy)
    few_shot(x, labels, **options)
    angle = torch.cat(seen)
    return (torch.atan2(angle[..., 1], angle[..., 0]) * len(x)).round().long()


def rows_as_angles(n):
    angle = torch.arange(n).double() / n
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_episodes_have_different_classes_and_no_image_twice(monkeypatch):
    _, labels = blobs([9, 4, 30, 6, 6, 5])
    rows = drawn(monkeypatch, rows_as_angles(60), labels, ways=3, shots=2, queries=4, episodes=200)
    assert rows.shape == (200, 3, 6)
    assert all(len(set(episode.flatten().tolist())) == 18 for episode in rows)
    of = labels[rows]
    assert (of == of[..., :1]).all()  # the images of a way are of one class
    assert all(len(set(classes.tolist())) == 3 for classes in of[..., 0])
    assert set(of.flatten().tolist()) == {0, 2, 3, 4}  # the large ones, and all of them


def test_classes_and_images_are_drawn_evenly(monkeypatch):
    labels = torch.arange(8).repeat_interleave(10)
    rows = drawn(monkeypatch, rows_as_angles(80), labels, ways=2, queries=1, episodes=2000)
    for place in (0, 1):  # as support and as query: 2000 * 2 in 80
        times = torch.bincount(rows[:, :, place].flatten(), minlength=80).float()
        assert (times - 50).abs().max() < 5 * 50**0.5


def test_small_classes_are_left_out_and_counted():
    x, labels = blobs([16, 15, 30, 16, 16, 16, 2])
    result = few_shot(x, labels * 10, episodes=20)
    assert (result.classes, result.left_out) == (5, 2)
    with pytest.raises(UserError, match=r"1 of 7 classes have 1 \+ 20 images"):
        few_shot(x, labels, queries=20)


def test_equal_features_of_a_class_are_all_right_and_noise_is_chance():
    labels = torch.arange(10).repeat_interleave(20)
    perfect = few_shot(torch.eye(10)[labels], labels, episodes=50)
    assert (perfect.accuracy, perfect.accuracy_ci95, perfect.best_f1) == (100, 0, 100)
    noise = few_shot(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)), labels)
    assert abs(noise.accuracy - 20) < 3
    assert noise.f1_all_yes == pytest.approx(100 / 3)


def test_saying_yes_to_all_gives_the_baseline():
    x, labels = blobs([20] * 6)
    for ways, shots in ((5, 1), (3, 2)):
        for averaging in ("pairs", "episodes"):
            result = few_shot(x, labels, ways=ways, shots=shots, episodes=9, thresholds=[-1.0], averaging=averaging)
            assert result.best_f1 == pytest.approx(result.f1_all_yes)


def test_the_best_threshold_is_labelled_as_chosen_on_the_test_episodes():
    result = few_shot(*blobs([20] * 6, noise=0.7), episodes=50)
    assert result.best_f1 == max(result.f1.values()) == result.f1[result.threshold]
    assert list(result.f1) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert result.selected_on == "the test episodes, as in the paper"
    assert "nothing to select" in few_shot(*blobs([20] * 6), episodes=9, thresholds=[0.5]).selected_on


def test_the_interval_holds_the_mean_of_very_many_episodes():
    x, labels = blobs([25] * 8, noise=1.5)
    truth = few_shot(x, labels, episodes=6000, seed=99).accuracy
    runs = [few_shot(x, labels, episodes=100, seed=seed) for seed in range(40)]
    inside = sum(abs(run.accuracy - truth) < run.accuracy_ci95 for run in runs)
    assert 33 <= inside < 40  # 38 are expected


def test_a_seed_fixes_the_result_and_scale_does_not_matter():
    x, labels = blobs([20] * 6)
    assert few_shot(x, labels, episodes=50) == few_shot(x * 4, labels, episodes=50)
    assert few_shot(x, labels, episodes=50) != few_shot(x, labels, episodes=50, seed=1)


def test_many_chunks_make_as_many_episodes(monkeypatch):
    x, labels = blobs([20] * 6)
    monkeypatch.setattr(fewshot, "CHUNK", 5 * 16 * 5 * 16 * 7)  # 7 episodes at a time
    rows = drawn(monkeypatch, rows_as_angles(120), labels, episodes=50)
    assert len(rows) == 50
    assert len({tuple(episode.flatten().tolist()) for episode in rows}) == 50
    assert few_shot(x, labels, episodes=50).episodes == 50


def test_a_feature_of_zeros_is_similar_to_nothing():
    x, labels = blobs([20] * 5)
    result = few_shot(torch.zeros_like(x), labels, episodes=5)
    assert result.best_f1 == 0
    assert result.accuracy == pytest.approx(20)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ways": 7}, "6 of 6 classes"),
        ({"ways": 1}, "2 ways"),
        ({"shots": 0}, "1 shot"),
        ({"queries": 0}, "1 query"),
        ({"episodes": 1}, "at least 2 episodes"),
        ({"thresholds": []}, "at least one cosine"),
        ({"thresholds": [1.5]}, "from -1 to 1"),
        ({"averaging": "micro"}, "pairs or episodes"),
        ({"features": torch.full((120, 8), math.nan)}, "NaN"),
        ({"labels": torch.zeros(120)}, "integer class id"),
    ],
)
def test_bad_input_is_named(given, words):
    x, labels = blobs([20] * 6)
    with pytest.raises(UserError, match=words):
        few_shot(**{"features": x, "labels": labels, **given})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_draws_the_same_episodes():
    x, labels = blobs([30] * 9)
    ours, theirs = few_shot(x.double().cuda(), labels.cuda()), few_shot(x.double(), labels)
    assert ours.accuracy == pytest.approx(theirs.accuracy)
    assert ours.f1 == pytest.approx(theirs.f1)
