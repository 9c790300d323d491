"""Similarities of patches from sums equal those of all pairs; positions are told where tokens hold them."""

import pytest
import torch

from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.patches import patches
from triptych.evals.transform import EvalTransform, batches
from triptych.losses import unit

TRANSFORM = EvalTransform.of(16)
SOURCE = open_source("scenes:20")
N, D = 4, 12


def content(images):
    """(B, 4, 12): pixels of each quarter."""
    small = torch.nn.functional.adaptive_avg_pool2d(images, 4)
    return small.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(images), N, D)


def measured(embed, **options):
    return patches(embed, SOURCE, TRANSFORM, workers=0, **options)


def test_similarities_are_means_over_all_pairs():
    result = measured(content, batch=7)
    x = torch.cat(
        [
            unit(content(images))
            for _, images in batches(SOURCE, TRANSFORM, batch=20, device=torch.device("cpu"), workers=0)
        ]
    )
    cosines = torch.einsum("and,bmd->abnm", x.double(), x.double())
    image, place = ~torch.eye(20, dtype=bool), ~torch.eye(N, dtype=bool)
    assert result.within == pytest.approx(cosines.diagonal()[place].mean().item(), abs=1e-6)
    assert result.between == pytest.approx(cosines[image].mean().item(), abs=1e-6)
    assert result.same_position == pytest.approx(cosines[image].diagonal(dim1=1, dim2=2).mean().item(), abs=1e-6)
    assert (result.images, result.held_out, result.chance) == (20, 4, 25.0)


def test_batch_size_changes_nothing():
    a, b = measured(content, batch=3), measured(content, batch=20)
    assert a.position_top1 == b.position_top1
    assert a.within == pytest.approx(b.within, abs=1e-12)


def test_positions_are_told_where_tokens_hold_them_and_not_where_they_do_not():
    position = torch.eye(N, D)
    held = measured(lambda images: content(images) + 100 * position)
    assert held.position_top1 == 100
    same = measured(lambda images: images.mean((2, 3))[:, None].expand(-1, N, -1))  # every patch has the image's code
    assert same.position_top1 == pytest.approx(25, abs=1e-6)
    assert same.within == pytest.approx(1, abs=1e-6)
    assert same.between < 1


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 5"):
        patches(content, open_source("scenes:3"), TRANSFORM, workers=0)
