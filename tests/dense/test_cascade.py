"""Heads of boxes and masks: stages, their thresholds and their losses, against the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from triptych.dense.cascade import (
    CASCADE,
    MASK_RCNN,
    CascadeHeads,
    HeadsConfig,
    RoIPool,
    Stage,
    StageConfig,
    likeliest,
    mask_targets,
)
from triptych.dense.layers import BatchNorm2d

STRIDES = (4.0, 8.0, 16.0, 32.0)
SIZES = [(64, 96)]


def small(stages=CASCADE, **more):
    options = {"box_head": "4conv1fc", "box_loss": "giou"} | more
    return HeadsConfig(stages, **options, channels=8, hidden=16, rois=16)


def maps(images=1, channels=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, channels, int(64 / s), int(96 / s), generator=generator) for s in STRIDES]


def target(masks=True):
    found = {"boxes": torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60]]), "labels": torch.tensor([1, 3])}
    if masks:
        found["masks"] = torch.zeros(2, 64, 96, dtype=torch.uint8)
        found["masks"][0, 8:40, 8:24] = 1
        found["masks"][1, 20:60, 50:90] = 1
    return found


def nothing(masks=True):
    found = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return found | ({"masks": torch.zeros(0, 64, 96, dtype=torch.uint8)} if masks else {})


def heads(config=None, masks=True, seed=0):
    torch.manual_seed(seed)
    return CascadeHeads(config or small(), STRIDES, 3, masks).train()


# --- what counts as an object ---


def test_each_stage_asks_for_more_overlap():
    """A box of IoU 0.65 has the object's label in the first two stages and is background in the third."""
    box, shifted = torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([[0.0, 0, 40, 26]])  # IoU = 26 / 40
    labels = []
    for stage in heads().stages:
        _, (of_stage,) = stage.assign_targets_to_proposals([shifted], [box], [torch.tensor([2])])
        labels += of_stage.tolist()
    assert labels == [2, 2, 0]


def test_the_papers_stages():
    assert [s.iou for s in CASCADE] == [0.5, 0.6, 0.7]
    assert [s.weight for s in CASCADE] == [1, 0.5, 0.25]
    assert [s.stds[2] for s in CASCADE] == [0.2, 0.1, 0.067]
    assert [s.iou for s in MASK_RCNN] == [0.5]


def test_deltas_are_divided_by_each_stages_deviations():
    """t = ((x - x_a) / w_a, (y - y_a) / h_a, log(w / w_a), log(h / h_a)) / stds."""
    anchor, box = torch.tensor([[10.0, 20, 50, 40]]), torch.tensor([[14.0, 18, 64, 48]])
    plain = [(39 - 30) / 40, (33 - 30) / 20, math.log(50 / 40), math.log(30 / 20)]
    for stage, config in zip(heads().stages, CASCADE, strict=True):
        wanted = torch.tensor([[t / s for t, s in zip(plain, config.stds, strict=True)]])
        torch.testing.assert_close(stage.box_coder.encode_single(box, anchor), wanted)
        torch.testing.assert_close(stage.box_coder.decode_single(wanted, anchor), box)


# --- losses ---


def giou(a, b):
    """Rezatofighi et al. 2019, of two boxes: IoU - (hull - union) / hull."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


BOXES = torch.tensor([[8.0, 8, 40, 40], [48, 20, 80, 60], [0, 0, 20, 20], [10, 10, 44, 38]])
LABELS = torch.tensor([1, 3, 0, 1])  # the third is background
OBJECTS = torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60], [0, 0, 0, 0], [8, 8, 40, 40]])


def predictions():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, generator=generator), 0.3 * torch.randn(4, 4, 4, generator=generator)


def test_giou_loss_is_of_decoded_boxes():
    """10 / n · sum over boxes on objects of 1 - GIoU(decoded box of the label, object)."""
    stage, (logits, deltas) = heads().stages[1], predictions()
    wanted = 0.0
    for i in (0, 1, 3):
        x, y, w, h = (d * s for d, s in zip(deltas[i, LABELS[i]].tolist(), CASCADE[1].stds, strict=True))
        left, top, right, bottom = BOXES[i].tolist()
        cx, cy = (left + right) / 2 + x * (right - left), (top + bottom) / 2 + y * (bottom - top)
        half_w, half_h = (right - left) * math.exp(w) / 2, (bottom - top) * math.exp(h) / 2
        wanted += 1 - giou((cx - half_w, cy - half_h, cx + half_w, cy + half_h), OBJECTS[i].tolist())
    found = stage.box_losses(logits, deltas, BOXES, LABELS, OBJECTS)
    assert found["box"].item() == pytest.approx(10 * wanted / 4, rel=1e-5)
    torch.testing.assert_close(found["class"], F.cross_entropy(logits, LABELS))


def test_mask_rcnns_box_loss_is_l1_not_smooth_l1():
    stage, (logits, deltas) = heads(small(MASK_RCNN, box_loss="l1")).stages[0], predictions()
    wanted = 0.0
    for i in (0, 1, 3):
        coded = stage.box_coder.encode_single(OBJECTS[i : i + 1], BOXES[i : i + 1])[0]
        wanted += sum(abs(d - t) for d, t in zip(deltas[i, LABELS[i]].tolist(), coded.tolist(), strict=True))
    found = stage.box_losses(logits, deltas, BOXES, LABELS, OBJECTS)
    assert found["box"].item() == pytest.approx(wanted / 4, rel=1e-5)


def test_stages_losses_are_weighted():
    """With all weights 1 the second and third stage's losses are twice and four times as large."""
    equal = tuple(StageConfig(s.iou, s.stds) for s in CASCADE)
    proposals = [torch.tensor([[10.0, 10, 42, 40], [0, 0, 30, 30], [45, 18, 88, 60]])]
    both = []
    for stages in (CASCADE, equal):
        model = heads(small(stages))
        torch.manual_seed(3)
        both.append(model.losses(maps(), proposals, SIZES, [target()]))
    assert list(both[0]) == [f"stage{s}_{term}" for s in (1, 2, 3) for term in ("class", "box", "mask")]
    for name, plain in both[1].items():
        assert both[0][name].item() == pytest.approx(plain.item() / {"1": 1, "2": 2, "3": 4}[name[5]], rel=1e-4)


def test_a_box_without_gradient_goes_to_the_next_stage():
    """Cascade R-CNN trains each stage on boxes as they are: box losses of stage 3 do not reach stage 2's deltas."""
    model = heads(masks=False)
    found = model.losses(maps(), [target()["boxes"] + 3], SIZES, [target(False)])
    (found["stage3_class"] + found["stage3_box"]).backward()
    second, third = model.stages[1], model.stages[2]
    assert second.box_predictor.bbox_pred.weight.grad is None
    assert third.box_predictor.bbox_pred.weight.grad.abs().sum() > 0


def test_the_next_stage_gets_refined_boxes_without_the_objects_themselves(monkeypatch):
    """A box moves by the deltas of its label, background by those of the likeliest class (here 2).

    Every stage is given the objects anew, as boxes of their own; refined, they would be there twice.
    """
    model, given = heads(masks=False), []
    first, second = model.stages[0], model.stages[1]
    with torch.no_grad():
        for layer in (first.box_predictor.cls_score, first.box_predictor.bbox_pred):
            layer.weight.zero_()
        first.box_predictor.cls_score.bias.copy_(torch.tensor([0.0, 0, 5, 0]))
        first.box_predictor.bbox_pred.bias.view(4, 4)[:, 0] = torch.arange(4.0)  # class k: k deviations of 0.1 widths
    ours = second.select_training_samples
    monkeypatch.setattr(second, "select_training_samples", lambda p, t: given.extend(p) or ours(p, t))
    proposals = torch.tensor([[10.0, 10, 40, 40], [0, 44, 20, 64], [85, 0, 95, 10]])  # on the first object; on none
    model.losses(maps(), [proposals], SIZES, [target(False)])
    moved = torch.tensor([[13.0, 10, 43, 40], [4, 44, 24, 64], [87, 0, 96, 10]])  # the last is cut to the image
    torch.testing.assert_close(given[0], moved)


def test_images_without_objects_train():
    model = heads()
    found = model.losses(maps(2), [BOXES, BOXES + 2], SIZES * 2, [nothing(), nothing()])
    sum(found.values()).backward()
    assert all(torch.isfinite(x) for x in found.values())
    assert found["stage1_box"] == found["stage1_mask"] == 0
    assert found["stage1_class"] > 0
    # Every parameter has a gradient, so that processes that train together agree.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_masks_are_learned_as_a_box_sees_them():
    """28 x 28 cells over the box, 1 where at least half of a cell is object."""
    box = torch.tensor([[8.0, 8, 40, 40]])
    found = mask_targets(target()["masks"], box, torch.tensor([0]), 28)
    wanted = torch.zeros(1, 28, 28)
    wanted[:, :, :14] = 1  # the left half
    torch.testing.assert_close(found, wanted)


def test_the_mask_of_a_box_is_its_labels_and_background_has_none():
    """Mean binary cross-entropy over the cells of boxes on objects; here class k has the logit k everywhere."""
    stage = heads().stages[0]
    layer = stage.mask_predictor.mask_fcn_logits
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(4.0))
    found = stage.mask_logits(maps(), [BOXES[:2]], LABELS[:2])
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0])[:, None, None].expand(2, 28, 28))
    matched = torch.tensor([0, 1, 0, 0])
    loss = stage.mask_loss(maps(), [BOXES], [LABELS], [matched], [target()])
    wanted = []
    for i in (0, 1, 3):
        cells = mask_targets(target()["masks"], BOXES[i : i + 1], matched[i : i + 1], 28).flatten()
        p = 1 / (1 + math.exp(-LABELS[i].item()))
        wanted += [-math.log(p) if cell else -math.log(1 - p) for cell in cells.tolist()]
    assert loss.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


# --- pieces ---


def test_a_box_is_read_from_the_map_of_its_size():
    """FPN's rule: 14 cells and less than 28 of the first map; the double on each further one."""
    sides = torch.tensor([5.0, 56, 111, 112, 223, 224, 447, 448, 2000])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], 1)
    assert RoIPool(STRIDES, 7).level(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert RoIPool((3.5, 7, 14, 28), 7).level(boxes[:4] * 0.875).tolist() == [0, 0, 0, 1]


def test_pooling_reads_where_the_box_is():
    """Of a map that holds its own coordinates, in pixels: each cell is the centre of its part of the box."""
    stride = 3.5  # of patches of 14 px, which torchvision would round to a power of 2
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    coordinates = (torch.stack([x, y])[None] + 0.5) * stride
    box = torch.tensor([[20.0, 30, 62, 86]])
    found = RoIPool((stride,), 7)([coordinates], [box])[0]
    torch.testing.assert_close(found[0, 0], torch.arange(7) * 6 + 23.0)
    torch.testing.assert_close(found[1, :, 0], torch.arange(7) * 8 + 34.0)


def test_cascade_heads_normalise_over_all_processes_and_mask_rcnns_have_no_norm():
    def norms(model):
        return [m for m in model.modules() if isinstance(m, BatchNorm2d)]

    assert len(norms(heads())) == 3 * 4
    assert not norms(heads(small(MASK_RCNN, box_head="2fc")))


def test_refinement_of_background_follows_the_likeliest_class():
    logits = torch.tensor([[9.0, 1, 2, 0], [0, 5, 1, 1]])
    assert likeliest(logits).tolist() == [2, 1]


# --- detection ---


def test_scores_and_masks_are_means_over_stages_and_boxes_the_last_stages():
    model = heads(small(score=0.0), masks=True).eval()
    proposals, features = [BOXES.clone()], maps()
    with torch.no_grad():
        boxes, total = proposals, 0.0
        for stage in model.stages:
            logits, deltas = stage.predict(features, boxes)
            total = total + logits
            moved = stage.refined(deltas, boxes, likeliest(logits), SIZES)
            last, boxes = boxes, list(moved)
        scores = (total / 3).softmax(-1)[:, 1:]
        (found,) = model.detect(features, proposals, SIZES)
    best = scores.max()
    assert found["scores"][0].item() == pytest.approx(best.item(), rel=1e-5)
    row, label = divmod(int(scores.argmax()), 3)
    decoded = model.stages[2].box_coder.decode_single(deltas[row, label + 1][None], last[0][row][None])
    clipped = decoded.clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64]))
    torch.testing.assert_close(found["boxes"][:1], clipped)
    assert found["labels"][0] == label + 1
    with torch.no_grad():
        masks = [s.mask_logits(features, [found["boxes"]], found["labels"]).sigmoid() for s in model.stages]
    assert masks[0].shape == (len(found["boxes"]), 28, 28)
    torch.testing.assert_close(found["masks"], (masks[0] + masks[1] + masks[2]) / 3)


def test_detections_keep_their_limits():
    model = heads(small(score=0.0, detections=5), masks=False).eval()
    (found,) = model.detect(maps(), [BOXES], SIZES)
    assert len(found["boxes"]) == 5
    assert "masks" not in found
    (none,) = heads(small(score=0.99)).eval().detect(maps(), [BOXES], SIZES)
    assert none["boxes"].shape == (0, 4)
    assert none["masks"].shape == (0, 28, 28)


def test_one_stage_alone_has_plain_names():
    config = small(MASK_RCNN, box_head="2fc", box_loss="l1")
    found = heads(config, masks=False).losses(maps(), [BOXES], SIZES, [target(False)])
    assert list(found) == ["class", "box"]


def test_a_stage_is_torchvisions():
    """Matching, sampling, coding and suppression are not ours."""
    from torchvision.models.detection.roi_heads import RoIHeads

    assert issubclass(Stage, RoIHeads)
    assert Stage.postprocess_detections is RoIHeads.postprocess_detections
    assert Stage.select_training_samples is RoIHeads.select_training_samples
