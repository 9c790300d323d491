"""Copy detection: the authors' descriptor, whitening and average precision; Copydays on disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.data.retrieval_sets import Wanted
from triptych.errors import UserError
from triptych.evals.copy_detection import copy_detection, copydays, whitening
from triptych.evals.retrieval import average_precision
from triptych.evals.selection import select
from triptych.tokens import Tokens, TokenSpec

NONE = np.empty(0, np.int64)


def of(*positive):
    return Wanted(np.array(positive, np.int64), NONE)


def test_the_descriptor_is_that_of_dino(golden):
    """Class token and generalised mean of the patches, side by side."""
    g = golden("retrieval_gem")
    tokens = g["tokens_with_cls"]

    class Recorded:
        spec, depth = TokenSpec(), 1

        def run(self, inputs, blocks):
            return [[Tokens(patch=tokens[:, 1:], patch_raw=tokens[:, 1:], grid=None, cls=tokens[:, 0])]]

    found = select(Recorded(), torch.zeros(len(tokens), 1), "cls+gem")
    torch.testing.assert_close(found, g["descriptor"], rtol=0, atol=1e-6)


def test_whitening_is_that_of_dino(golden):
    """Up to the sign and order of its axes, which no cosine sees: inner products are compared."""
    g = golden("retrieval_whiten")
    mean, projection = whitening(g["whiten_set"])
    torch.testing.assert_close(mean, g["mean"], rtol=0, atol=1e-12)
    white = (g["queries"] - mean) @ projection
    torch.testing.assert_close(white @ white.T, g["gram"].double(), rtol=1e-5, atol=2e-4)  # theirs is float32


def test_whitening_bounds_directions_that_hardly_vary():
    x = torch.randn(500, 3, dtype=torch.float64, generator=torch.manual_seed(0)) * torch.tensor([1.0, 0.1, 1e-6])
    _, projection = whitening(x)
    lengths = projection.norm(dim=0).sort().values  # 1 / sqrt(eigenvalue)
    assert lengths[2] / lengths[0] == pytest.approx(1e5**0.5)
    assert lengths[1] / lengths[0] == pytest.approx(10, rel=0.1)


def test_average_precision_of_cut_lists_is_that_of_dino(golden):
    g = golden("retrieval_copy_ap")
    for ranks, relevant, ap in zip(g["ranks_padded"], g["n_relevant"], g["ap"], strict=True):
        found = ranks[ranks >= 0].numpy()
        assert average_precision(found, int(relevant)) == pytest.approx(100 * float(ap), abs=1e-9)


def ranked(images):
    """Database rows whose cosine with the query [1, 0] falls with the index."""
    angle = torch.linspace(0, 1.5, images)
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_originals_count_as_lost_behind_the_top():
    database, query = ranked(40), torch.tensor([[2.0, 0.0]])
    for rank, expected in ((0, 100), (19, 100 * (1 / 20) / 2), (20, 0)):
        assert copy_detection(database, query, [of(rank)]).mean_ap == pytest.approx(expected)
    both = copy_detection(database, query, [of(0, 30)])
    assert both.mean_ap == pytest.approx(50), "one of two found, at once"
    assert copy_detection(database, query, [of(20)], top=30).mean_ap > 0


def test_distractors_take_places_but_are_never_wanted():
    originals, query = ranked(3)[2:], torch.tensor([[1.0, 0.0]])
    alone = copy_detection(originals, query, [of(0)])
    among = copy_detection(originals, query, [of(0)], distractors=ranked(3)[:2])
    assert (alone.mean_ap, among.mean_ap) == (100, pytest.approx(100 * (1 / 3) / 2))
    assert (among.originals, among.distractor_images, among.copies) == (1, 2, 1)


def test_cosines_are_those_of_whitened_features():
    g = torch.manual_seed(0)
    loud = torch.tensor([30.0, 1, 1, 1, 1, 1])  # a direction that says nothing, but dominates cosines
    originals, others = torch.randn(30, 6, generator=g), torch.randn(2000, 6, generator=g) * loud
    copies = originals + 0.1 * torch.randn(30, 6, generator=g)
    noise = [torch.randn(30, 1, generator=g) * loud[0] for _ in range(2)]
    originals, copies = (torch.cat([n, x[:, 1:]], 1) for n, x in zip(noise, (originals, copies), strict=True))
    truth = [of(i) for i in range(30)]
    plain, white = (copy_detection(originals, copies, truth, whiten_on=w) for w in (None, others))
    assert (plain.whitening_images, white.whitening_images) == (0, 2000)
    assert white.mean_ap > plain.mean_ap + 20
    mean, projection = whitening(others.double())
    by_hand = copy_detection(*((x.double() - mean) @ projection for x in (originals, copies)), truth)
    assert white.ap == pytest.approx(by_hand.ap)


def test_copies_without_original_are_skipped_and_counted():
    result = copy_detection(ranked(3), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [of(0), of()])
    assert (result.ap, result.skipped, result.mean_ap) == ((100, None), 1, 100)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((ranked(3), ranked(2), [of(0)]), {}, "1 copies; there are 2"),
        ((ranked(3), ranked(1), [of(3)]), {}, "of_readable"),
        ((ranked(3), ranked(1), [of()]), {}, "no copy has an original"),
        ((ranked(3), ranked(1), [of(0)]), {"top": 0}, "top is 0"),
        ((ranked(3), ranked(1), [of(0)]), {"whiten_on": torch.zeros(4, 3)}, "'whitening': 3"),
        ((ranked(3), ranked(1) / 0, [of(0)]), {}, "copy features hold NaN"),
    ],
)
def test_bad_input_is_told(arguments, options, text):
    with pytest.raises(UserError, match=text):
        copy_detection(*arguments, **options)


@pytest.fixture
def on_disk(tmp_path):
    files = {
        "original": [200000, 200100, 200200],
        "strong": [200001, 200102, 200103, 299900],
        "jpeg/3": [200000, 200200],
    }
    for folder, names in files.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.jpg")
    return tmp_path


def test_copies_belong_to_originals_by_name(on_disk):
    strong, jpeg = copydays(on_disk), copydays(on_disk, "jpeg/3")
    assert [w.positive.tolist() for w in strong.truth["strong"]] == [[0], [1], [1], []]
    assert [w.positive.tolist() for w in jpeg.truth["jpeg/3"]] == [[0], [2]]
    assert (len(strong.gallery), len(strong.queries)) == (3, 4)


def test_originals_with_the_same_beginning_are_refused(on_disk):
    Image.new("RGB", (8, 8)).save(on_disk / "original" / "200105.jpg")
    assert len(copydays(on_disk, "jpeg/3").gallery) == 4, "whole names still tell them apart"
    with pytest.raises(UserError, match=r"first 4 characters \(2001"):
        copydays(on_disk)
