"""The detector around its heads: anchors, proposals, padding, and that all of it learns."""

import pytest
import torch
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from conftest import tiny_encoder
from triptych.dense.cascade import CASCADE, HeadsConfig
from triptych.dense.mask_rcnn import Anchors, Detector, DetectorConfig, L1Proposals
from triptych.dense.pyramid import Pyramid
from triptych.encoders.swin_build import SwinConfig
from triptych.encoders.swin_build import build as build_swin
from triptych.errors import UserError
from triptych.tokens import TokenSpec

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = HeadsConfig(channels=8, hidden=16, rois=16)
CONFIG = DetectorConfig(SMALL, anchors=16, train_proposals=(40, 20), test_proposals=(40, 20))


def detector(encoder=None, config=CONFIG, masks=True, seed=0):
    torch.manual_seed(seed)
    encoder = tiny_encoder(TokenSpec(), image=32, patch=8) if encoder is None else encoder
    return Detector(Pyramid(encoder, norm=config.norm), config, classes=2, masks=masks, mean=MEAN, std=STD)


def batch(masks=True):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for height, width, n in ((40, 64, 2), (60, 44, 0)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        boxes = torch.tensor([[4.0, 4, 30, 30], [20, 10, 60, 38]])[:n]
        example = {"image": image, "boxes": boxes, "labels": torch.tensor([1, 2])[:n]}
        if masks:
            example["masks"] = torch.zeros(n, height, width, dtype=torch.uint8)
            example["masks"][:, 8:25, 22:28] = 1
        examples.append(example)
    return examples


# --- anchors ---


def test_anchors_are_eight_cells_wide_and_of_three_ratios():
    """Area (8 · stride)², height / width 1/2, 1, 2, around the corner of each cell: mmdet's standard."""
    found = Anchors([4.0]).of_map(torch.zeros(1, 1, 2, 3), 4.0)
    assert found.shape == (2 * 3 * 3, 4)
    for n, (left, top, right, bottom) in enumerate(found.tolist()):
        cell, ratio = divmod(n, 3)
        row, column = divmod(cell, 3)
        assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((4 * column, 4 * row), abs=1e-5)
        assert (right - left) * (bottom - top) == pytest.approx(32**2, rel=1e-5)
        assert (bottom - top) / (right - left) == pytest.approx((0.5, 1, 2)[ratio], rel=1e-5)


@pytest.mark.parametrize(("patch", "strides"), [(16, [4, 8, 16, 32]), (14, [3.5, 7, 14, 28]), (8, [4, 8, 16, 32])])
def test_anchors_follow_the_pyramids_strides(patch, strides):
    """Also of patches of 14 px, whose first maps have no whole stride."""
    model = detector(tiny_encoder(TokenSpec(), image=4 * patch, patch=patch))
    assert model.pyramid.strides == strides
    side = 2 * model.multiple
    images, maps = model._maps([torch.zeros(3, side, side, dtype=torch.uint8)])
    anchors = model.rpn.anchor_generator(images, list(maps.values()))[0]
    wanted = [
        s * 8 for s, x in zip([*strides, 2 * strides[-1]], maps.values(), strict=True) for _ in range(x[0, 0].numel())
    ]
    torch.testing.assert_close(anchors[1::3, 2] - anchors[1::3, 0], torch.tensor(wanted, dtype=torch.float32))
    last_of_first = anchors[3 * maps["0"][0, 0].numel() - 2]
    torch.testing.assert_close((last_of_first[:2] + last_of_first[2:]) / 2, torch.full((2,), float(side - strides[0])))


# --- proposals ---


def test_proposals_have_an_l1_loss_where_torchvision_has_smooth_l1():
    torch.manual_seed(0)
    deltas, wanted = torch.randn(30, 4), torch.randn(30, 4) * 0.05
    objectness, labels = torch.randn(30, 1), torch.zeros(30)
    labels[:4], labels[25:] = 1, -1  # of the last five neither object nor background is known
    arguments = (objectness, deltas, [labels], [wanted])
    ours, theirs = (detector(config=config).rpn for config in (CONFIG, with_loss("smooth_l1")))
    assert type(ours) is L1Proposals
    assert type(theirs) is RegionProposalNetwork
    found = []
    for rpn in (ours, theirs):
        torch.manual_seed(1)
        scores, boxes = rpn.compute_loss(*arguments)
        found.append((scores.item(), boxes.item()))
    apart = (deltas - wanted)[:4].abs()
    assert found[0][1] == pytest.approx(apart.sum().item() / 16, rel=1e-5)  # 16 anchors are sampled
    beta = 1 / 9
    smooth = torch.where(apart < beta, apart**2 / (2 * beta), apart - beta / 2)
    assert found[1][1] == pytest.approx(smooth.sum().item() / 16, rel=1e-5)
    assert found[0][0] == found[1][0]


def with_loss(name):
    return DetectorConfig(SMALL, anchors=16, train_proposals=(40, 20), test_proposals=(40, 20), proposal_loss=name)


def test_another_loss_is_a_users_mistake():
    with pytest.raises(UserError, match="l1 or smooth_l1"):
        with_loss("l2")


def test_anchors_and_deltas_stay_float32_under_autocast():
    """In bfloat16 a coordinate of 500 px would be off by a pixel or two."""
    model = detector()
    with torch.autocast("cpu", torch.bfloat16):
        images, maps = model._maps([e["image"] for e in batch()])
        scores, deltas = model.rpn.head(list(maps.values()))
        proposals, _ = model.eval().rpn(images, maps)
    assert {x.dtype for x in [*scores, *deltas, *proposals]} == {torch.float32}


# --- the whole ---


def test_images_are_normalised_then_padded():
    model = detector()
    images, maps = model._maps([e["image"] for e in batch()])
    assert images.tensors.shape == (2, 3, 64, 64)  # multiples of the coarsest stride, 32
    assert images.image_sizes == [(40, 64), (60, 44)]
    pixel = batch()[0]["image"][:, 5, 7].float() / 255
    torch.testing.assert_close(images.tensors[0, :, 5, 7], (pixel - torch.tensor(MEAN)) / torch.tensor(STD))
    assert images.tensors[0, :, 40:].abs().max() == 0
    assert [tuple(x.shape[2:]) for x in maps.values()] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]


def test_padding_does_not_hold_proposals():
    model = detector().eval()
    images, maps = model._maps([e["image"] for e in batch()])
    for boxes, (height, width) in zip(model.rpn(images, maps)[0], images.image_sizes, strict=True):
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height


def test_heads_know_every_images_size_and_four_of_five_maps(monkeypatch):
    """Refined boxes are cut to their own image, not to the padding; the coarsest map is for proposals."""
    model, seen = detector().train(), []
    monkeypatch.setattr(model.heads, "losses", lambda *given: seen.extend(given) or {})
    model(batch())
    maps, proposals, sizes, _ = seen
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert sizes == [(40, 64), (60, 44)]
    assert len(proposals) == 2


@pytest.mark.parametrize("masks", [True, False])
def test_without_masks_it_is_faster_r_cnn(masks):
    model = detector(masks=masks)
    assert any("mask" in name for name, _ in model.named_parameters()) == masks
    found = model.train()(batch(masks))
    assert list(found) == ["objectness", "proposal", "class", "box", *(["mask"] if masks else [])]
    (detected, _) = model.eval().detect([e["image"] for e in batch()])
    assert ("masks" in detected) == masks


def test_a_swins_own_stages_are_its_pyramid():
    sizes = {"patch_size": 2, "window_size": 4, "width": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)}
    model = detector(build_swin(SwinConfig(image_size=32, **sizes), TokenSpec(cls=0)))
    assert model.pyramid.strides == [2, 4, 8, 16]
    found = model.train()(batch())
    assert all(torch.isfinite(x) for x in found.values())


def test_every_parameter_learns_in_a_cascade():
    config = DetectorConfig(HeadsConfig(CASCADE, "4conv1fc", "giou", 8, 16, 16), train_proposals=(40, 20))
    model = detector(tiny_encoder(TokenSpec(), image=32, patch=8, depth=4).without("prefix"), config).train()
    sum(model(batch()).values()).backward()
    # The final norm is off.
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"pyramid.encoder.vit.norm.weight", "pyramid.encoder.vit.norm.bias"}


def test_a_detector_learns_two_rectangles():
    image = torch.full((3, 64, 64), 110, dtype=torch.uint8)
    image[0, 8:40, 4:30], image[2, 20:60, 36:60] = 250, 250
    example = {"image": image, "boxes": torch.tensor([[4.0, 8, 30, 40], [36, 20, 60, 60]])}
    example |= {"labels": torch.tensor([1, 2])}
    heads = HeadsConfig(channels=16, hidden=64, rois=32)
    config = DetectorConfig(heads, anchors=64, train_proposals=(60, 30), test_proposals=(40, 20))
    model, steps = detector(config=config, masks=False).train(), 60
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - step / steps))
        optimizer.zero_grad()
        sum(model([example]).values()).backward()
        optimizer.step()
    (found,) = model.eval().detect([image])
    assert sorted(found["labels"][:2].tolist()) == [1, 2]
    assert found["scores"][:2].min() > 0.5
    best = found["boxes"][:2][found["labels"][:2].argsort()]
    assert box_iou(best, example["boxes"]).diagonal().min() > 0.5
