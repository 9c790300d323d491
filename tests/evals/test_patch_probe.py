"""The quick probe of patch tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from coloured import IGNORE, Coloured

from conftest import tiny_encoder
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.class_maps import figures
from triptych.evals.patch_probe import Prepare, Probe, patch_labels, patch_probe
from triptych.tokens import TokenSpec


def model():
    torch.manual_seed(0)
    return Loaded(tiny_encoder(TokenSpec(cls_plus=1)).eval(), "tiny", 16)


def probed(train=None, val=None, **options):
    given = {"size": 24, "workers": 0, "seed": 3} | options
    return patch_probe(model(), train or Coloured(12), val or Coloured(4, seed=1), **given)


def test_a_patch_has_the_class_of_at_least_half_of_its_pixels():
    rng = np.random.default_rng(0)
    for patch in (1, 2, 3, 4):
        mask = rng.choice([0, 1, 7, IGNORE], (5 * patch, 6 * patch), p=[0.5, 0.3, 0.1, 0.1]).astype(np.uint8)
        found = patch_labels(mask, patch)
        for row in range(5):
            for column in range(6):
                cell = mask[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                owners = [c for c in (0, 1, 7) if 2 * (cell == c).sum() >= patch * patch]
                ignored = 2 * (cell == IGNORE).sum() > patch * patch
                expected = IGNORE if ignored or not owners else owners[0]
                assert found[row * 6 + column] == expected


def test_colours_are_told_by_a_linear_map_of_tokens():
    result = probed()
    assert result.miou > 85
    assert result.miou > result.floor_miou + 50
    assert result.converged
    assert probed(per_image=5).miou > 75  # also of few patches, each with its own features
    assert (result.val_images, result.train_images, result.probed_images, result.classes) == (4, 12, 12, 3)
    assert figures(result)[0].value == result.miou


def test_the_seed_draws_images_and_patches_and_bounds_them():
    first = probed(images=5, per_image=4)
    assert (first.patches, first.probed_images) == (20, 5)
    assert probed(images=5, per_image=4) == first
    assert replace(probed(images=5, per_image=4, seed=4), seed=3) != first


def test_the_encoder_is_left_as_it_was():
    own = model()
    own.encoder.train()
    patch_probe(own, Coloured(6), Coloured(2), size=16, workers=0)
    assert own.encoder.training


def test_sides_are_whole_patches_of_nearly_the_images_aspect():
    prepare = Prepare(24, 4, (0.5,) * 3, (0.5,) * 3)
    assert prepare.sides(360, 480) == (24, 32)
    assert prepare.sides(480, 350) == (32, 24)
    assert prepare.inputs(np.zeros((100, 130, 3), np.uint8))[0].shape == (3, 24, 32)
    assert len(prepare.labels(np.zeros((100, 130), np.uint8))) == 48


def test_classes_without_train_patches_are_never_predicted():
    """Labels 0 and 2 of three: class 1 has a place in the scores, but no logit."""
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.where(x[:, 0] > 0, 2, 0)
    probe = Probe(x, labels)
    assert probe.known.tolist() == [0, 2]
    logits = probe.logits(x.T.reshape(5, 8, 5))
    assert logits.shape == (2, 8, 5)
    assert (probe.known[logits.argmax(0)].flatten() == labels).all()


def test_a_class_that_was_not_learned_keeps_its_place_in_the_scores():
    train, val = Coloured(12), Coloured(4, seed=1)
    masks = Coloured(12)
    train.mask = lambda index: np.where(masks.mask(index) == 0, IGNORE, masks.mask(index)).astype(np.uint8)
    result = probed(train, val)
    assert result.iou["red"] == 0
    blue_or_green = [val.mask(i)[val.mask(i) != IGNORE] for i in range(4)]
    assert sum((x > 0).sum() for x in blue_or_green) * 0.8 < result.pixel_accuracy / 100 * sum(map(len, blue_or_green))


@pytest.mark.parametrize("options", [{"size": 3}, {"images": 0}, {"per_image": 0}])
def test_sizes_and_counts_must_make_sense(options):
    with pytest.raises(UserError, match="give at least a patch"):
        probed(**options)


def test_a_set_of_one_class_is_refused():
    one = Coloured(2)
    one.mask = lambda index: np.zeros((8, 8), np.uint8)
    with pytest.raises(UserError, match="a probe needs two classes"):
        probed(one)


def test_images_that_cannot_be_read_are_left_out():
    result = probed(Coloured(6, unreadable=(1,)), Coloured(4, unreadable=(0,)))
    assert (result.probed_images, result.val_images, result.unreadable) == (5, 3, 1)
