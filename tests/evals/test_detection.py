"""Detection as a protocol: presets, training, measuring, going on, and mistakes before work."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_encoder
from drawn_coco import draw_coco
from triptych.data.coco import open_file
from triptych.dense.detect_data import Sizes
from triptych.encoders.load import Loaded
from triptych.errors import Interrupted, UserError
from triptych.evals import detection as module
from triptych.evals.detection import build, detect_all, detection, figures
from triptych.evals.detection_presets import PRESETS, preset_of
from triptych.evals.presets import with_changes
from triptych.tokens import TokenSpec

SIZES = Sizes(short=(32, 40), longest=64, before_crop=(32, 48), crop=(24, 40), test_size=40)
SMALL = {"channels": 8, "hidden": 16, "rois": 8, "anchors": 16, "train_proposals": (30, 16), "test_proposals": (30, 16)}


def tiny(name="mask_rcnn_small", **values):
    more = {"batch": 2, "steps": 4, "warmup": 1} | SMALL | values
    return replace(with_changes(PRESETS[name], more), sizes=SIZES)


def loaded(**options):
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(), image=32, patch=8, depth=4, **options)
    return Loaded(encoder.requires_grad_(False), "tiny", 32)


@pytest.fixture
def sets(tmp_path):
    return draw_coco(tmp_path / "a", "train", 4), draw_coco(tmp_path / "b", "val", 3, seed=1, empty=1)


def run(sets, out, preset=None, **options):
    return detection(loaded(), *sets, preset or tiny(), out=out, workers=0, **options)


# --- the protocol ---


def test_masks_and_boxes_are_learned_and_measured(sets, tmp_path):
    result = run(sets, tmp_path / "out")
    assert result.mask is not None
    assert (result.train_images, result.test_images, result.classes, result.steps) == (4, 3, 2, 4)
    assert set(result.box.class_ap50) == {"red", "blue"}
    assert 0 <= result.box.ap <= 100
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"objectness", "proposal", "class", "box", "mask"} <= rows[0].keys()
    json.dumps([f.value for f in figures(result)])


def test_detections_are_in_cocos_form_and_in_pixels_of_the_images(sets, tmp_path):
    result = run(sets, tmp_path / "out", tiny(score=0.0))
    found = json.loads(Path(result.detections).read_text())
    assert {d["category_id"] for d in found} <= {1, 5}
    assert {d["image_id"] for d in found} == {10, 11, 12}
    for d in found:
        left, top, width, height = d["bbox"]
        assert min(left, top) >= 0
        assert left + width <= 64 + 1e-3
        assert top + height <= 48 + 1e-3
        assert d["segmentation"]["size"] == [48, 64]


def test_a_set_without_masks_makes_it_faster_r_cnn(tmp_path):
    train, val = draw_coco(tmp_path / "a", masks=False), draw_coco(tmp_path / "b", "val", 2, seed=1)
    result = run((train, val), tmp_path / "out")
    assert result.mask is None
    assert not [f for f in figures(result) if "mask" in f.name]
    assert "segmentation" not in Path(result.detections).read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cascade_runs_through_the_same_protocol(sets, tmp_path, precision):
    result = run(sets, tmp_path / "out", tiny("cascade_small", steps=2, precision=precision))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"stage1_class", "stage2_box", "stage3_mask"} <= rows[0].keys()
    assert result.mask is not None


def test_an_interrupted_training_goes_on_to_the_same_numbers(sets, tmp_path, monkeypatch):
    whole = run(sets, tmp_path / "whole", tiny(score=0.0))
    stop = {"after": 2}
    first = module.Detector.forward

    def forward(self, batch):
        if stop["after"] == 0:
            raise Interrupted(15, 2)
        stop["after"] -= 1
        return first(self, batch)

    monkeypatch.setattr(module, "_settings", lambda p, n, make=module._settings: replace(make(p, n), save_every=1))
    monkeypatch.setattr(module.Detector, "forward", forward)
    with pytest.raises(Interrupted):
        run(sets, tmp_path / "part", tiny(score=0.0))
    monkeypatch.setattr(module.Detector, "forward", first)
    part = run(sets, tmp_path / "part", tiny(score=0.0))
    assert json.loads(Path(part.detections).read_text()) == json.loads(Path(whole.detections).read_text())
    assert part == replace(whole, detections=part.detections)


def test_a_finished_training_is_measured_again(sets, tmp_path):
    first = run(sets, tmp_path / "out", tiny(steps=2, score=0.0))
    found = Path(first.detections).read_text()
    assert run(sets, tmp_path / "out", tiny(steps=2, score=0.0)) == first
    assert Path(first.detections).read_text() == found
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_another_preset_in_the_same_folder_is_a_users_mistake(sets, tmp_path):
    run(sets, tmp_path / "out", tiny(steps=2))
    with pytest.raises(UserError, match="another training"):
        run(sets, tmp_path / "out", tiny(steps=2, lr=1e-2))


def test_class_tokens_stay_or_go_as_the_preset_says_and_the_model_stays_as_it_was():
    model = loaded()
    before = [p.clone() for p in model.encoder.parameters()]
    kept = build(model, tiny("cascade_small"), 2, masks=False, seed=0).pyramid.encoder
    gone = build(model, tiny(), 2, masks=False, seed=0).pyramid.encoder
    assert (kept.spec.cls, gone.spec.cls) == (1, 0)
    assert all(p.requires_grad for p in gone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.encoder.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_the_head_comes_from_the_seed_not_from_the_global_generator():
    torch.manual_seed(1)
    one = build(loaded(), tiny(), 2, masks=True, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = build(Loaded(one.pyramid.encoder, "tiny", 32), tiny(), 2, masks=True, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), (_, b) in zip(one.heads.named_parameters(), two.heads.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_number_of_classes_is_the_sources():
    for classes in (1, 3):
        stage = build(loaded(), tiny(), classes, masks=True, seed=0).heads.stages[0]
        assert stage.box_predictor.cls_score.out_features == classes + 1
        assert stage.box_predictor.bbox_pred.out_features == 4 * (classes + 1)
        assert stage.mask_predictor.mask_fcn_logits.out_channels == classes + 1


def test_an_image_that_cannot_be_read_is_left_out(sets, tmp_path):
    (tmp_path / "b" / "val" / "0.png").write_bytes(b"no image")
    detector = build(loaded(), tiny(), 2, masks=False, seed=0).eval()
    found, images = detect_all(detector, sets[1], SIZES, torch.device("cpu"))
    assert images == [11, 12]
    assert {d["image_id"] for d in found} <= {11, 12}


def test_a_detection_goes_back_to_where_it_was(sets):
    """What the detector sees in its own size is reported in the image's: a box on all of it becomes the image."""

    class All(torch.nn.Module):
        def detect(self, images):
            height, width = images[0].shape[1:]
            box = torch.tensor([[0.0, 0.0, width, height]])
            return [{"boxes": box, "scores": torch.ones(1), "labels": torch.tensor([2])}]

    found, _ = detect_all(All(), sets[1], replace(SIZES, test_size=36), torch.device("cpu"))
    np.testing.assert_allclose([d["bbox"] for d in found], [[0, 0, 64, 48]] * 3, atol=1e-3)
    assert {d["category_id"] for d in found} == {5}


# --- mistakes ---


def test_mistakes_are_said_before_any_work(sets, tmp_path):
    train, val = sets
    nothing = draw_coco(tmp_path / "c", count=1, empty=0)
    with pytest.raises(UserError, match="no objects"):
        run((train, nothing), tmp_path / "out")
    document = json.loads(val.json_path.read_text())
    document["categories"][0]["name"] = "green"
    val.json_path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="same classes"):
        run((train, open_file("other", val.json_path, val.json_path.parent)), tmp_path / "out")
    with pytest.raises(UserError, match="did you mean mask_rcnn_udi"):
        preset_of("mask_rcnn_uid")
    assert not (tmp_path / "out").exists()


def test_a_warm_up_that_takes_all_steps_is_a_users_mistake(sets, tmp_path):
    with pytest.raises(UserError, match="warms up for 1000"):
        run(sets, tmp_path / "out", PRESETS["mask_rcnn_udi"])


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": math.inf}, {"batch": 0}, {"drop_path": 1.0}, {"layer_decay": 0.0}])
def test_values_that_cannot_train(bad):
    with pytest.raises(UserError):
        with_changes(PRESETS["mask_rcnn_small"], bad)


def test_steps_and_epochs_are_not_both_given():
    assert with_changes(PRESETS["mask_rcnn_udi"], {"epochs": 100}).count(205) == 100 * 25
    assert with_changes(PRESETS["mask_rcnn_udi"], {"steps": 2000}).count(205) == 2000
    with pytest.raises(UserError, match="counts in steps"):
        with_changes(PRESETS["mask_rcnn_small"], {"epochs": 3})


def test_every_setting_has_one_name():
    """Settings of heads, detector and sizes are given by name alone (`--rois 128 --test_size 480`)."""
    p = with_changes(PRESETS["mask_rcnn_small"], {"rois": 128, "short": [200, 220], "test_size": 210, "anchors": 99})
    assert (p.detector.heads.rois, p.sizes.short, p.sizes.test_size, p.detector.anchors) == (128, (200, 220), 210, 99)
    names = [f.name for part in (p, p.detector, p.detector.heads, p.sizes) for f in fields(part)]
    assert len(names) == len(set(names))


# --- presets ---


def test_udis_preset_is_mask_rcnn_1x():
    p = PRESETS["mask_rcnn_udi"]
    assert (p.lr, p.batch, p.epochs, p.weight_decay, p.warmup, p.drop_path) == (5e-5, 8, 12, 0.05, 1000, 0.05)
    assert (p.prefix, p.detector.norm, p.layer_decay) == (False, False, 1.0)
    assert (p.detector.heads.box_head, p.detector.heads.box_loss, p.detector.proposal_loss) == ("2fc", "l1", "l1")
    assert p.sizes == Sizes()


@pytest.mark.parametrize(("size", "decay", "drop_path", "batch"), [("s", 0.8, 0.1, 32), ("b", 0.75, 0.2, 16)])
@pytest.mark.parametrize("paper", ["mte", "ibot"])
def test_ibots_and_mtes_presets_are_cascades(paper, size, decay, drop_path, batch):
    p = PRESETS[f"cascade_{paper}_{size}"]
    assert (p.lr, p.layer_decay, p.drop_path, p.batch) == (1e-4, decay, drop_path, batch)
    assert (p.warmup, p.warmup_start, p.prefix) == (500, 0.001, True)
    assert [s.iou for s in p.detector.heads.stages] == [0.5, 0.6, 0.7]
    assert (p.detector.heads.box_head, p.detector.heads.box_loss) == ("4conv1fc", "giou")


def test_the_rate_warms_up_and_drops_after_epochs_8_and_11():
    p = PRESETS["mask_rcnn_udi"]
    steps = p.count(117_266)  # train2017 with boxes, as mmdet filters it
    assert steps == 12 * 14_658
    assert p.rate(0, steps) == pytest.approx(0.001)
    assert p.rate(500, steps) == pytest.approx(1 - 0.5 * 0.999)
    assert p.rate(1000, steps) == 1
    at = [p.rate(epoch * 14_658 + shift, steps) for epoch in (8, 11) for shift in (-1, 0)]
    assert at == pytest.approx([1, 0.1, 0.1, 0.01])
