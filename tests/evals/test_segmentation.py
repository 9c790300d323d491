"""Training a segmenter and measuring it: the whole protocol on images whose colours are their classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from coloured import IGNORE, Coloured

from conftest import tiny_encoder
from triptych import checkpoint
from triptych.data.sources import load_rgb
from triptych.dense.inference import predict
from triptych.dense.miou import Confusion
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.class_maps import figures, most_frequent
from triptych.evals.features import encoder_hash
from triptych.evals.presets import with_changes
from triptych.evals.segmentation import load_segmenter, segmentation
from triptych.evals.segmentation_presets import PRESETS, SegmentationPreset, poly, preset_of
from triptych.tokens import TokenSpec

TRAIN, VAL = Coloured(24), Coloured(6, seed=5)  # another class is the most frequent one in each
SHORT = {"steps": 25, "warmup": 2, "batch": 4, "lr": 0.02, "crop": 16, "short": 24, "save_every": 10}


def model(**options):
    torch.manual_seed(0)
    return Loaded(tiny_encoder(TokenSpec(), **options).eval(), "tiny", 16)


def run(out, preset="linear_small", train=TRAIN, val=VAL, own=None, seed=0, **changes):
    settings = with_changes(preset_of(preset), SHORT | changes)
    return segmentation(own or model(), train, val, settings, out=out, seed=seed, workers=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("linear") / "run"
    return out, run(out)


def test_rates_are_mmcvs_poly_with_linear_warm_up(golden):
    g = golden("seg_poly_lr")
    assert float(g["warmup_ratio"]) == 1e-6
    rate = poly(int(g["total"]), int(g["warmup"]), float(g["power"]))
    found = torch.tensor([float(g["peak"]) * rate(i) for i in g["iteration"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, g["lr"], rtol=1e-12, atol=0)
    preset = PRESETS["mmc"]
    assert (preset.lr, preset.steps, preset.warmup) == (float(g["peak"]), int(g["total"]), int(g["warmup"]))
    assert preset.fit().rate(777) == rate(777)


def test_a_linear_layer_learns_what_frozen_tokens_tell(trained):
    _, result = trained
    assert result.miou > 70
    assert result.pixel_accuracy > result.floor_pixel_accuracy + 30
    assert set(result.iou) == set(TRAIN.classes)
    assert (result.val_images, result.unreadable, result.train_images) == (6, 0, 24)
    assert result.blocks == [1, 2]  # of 6 8 10 12 in an encoder of two
    assert (result.crop, result.short, result.stride, result.mode) == (16, 24, 10, "slide")


def test_the_floor_is_the_most_frequent_class_of_the_training_images(trained):
    _, result = trained
    counts = sum(np.bincount(TRAIN.mask(i).ravel(), minlength=256)[:3] for i in range(24))
    always = int(counts.argmax())
    assert result.floor_class == TRAIN.classes[always]
    assert always != sum(np.bincount(VAL.mask(i).ravel(), minlength=256)[:3] for i in range(6)).argmax()
    labels = [VAL.mask(i) for i in range(6)]
    share = sum((x == always).sum() for x in labels) / sum((x != IGNORE).sum() for x in labels)
    assert result.floor_pixel_accuracy == pytest.approx(100 * share)
    assert result.floor_miou == pytest.approx(100 * share / 3)
    assert any(f"{result.floor_miou:.2f}" in f.detail for f in figures(result))


def test_the_saved_segmenter_predicts_what_was_measured(trained):
    out, result = trained
    segmenter, inference, classes = load_segmenter(out, model())
    assert classes == VAL.classes
    confusion = Confusion(3)
    for i in range(6):
        found = predict(segmenter, np.asarray(load_rgb(VAL, i)), inference)
        assert found.shape == VAL.mask(i).shape
        confusion.add(torch.from_numpy(VAL.mask(i)), found)
    assert confusion.scores().miou == pytest.approx(result.miou)
    with pytest.raises(UserError, match="was trained on tiny, not on"):
        load_segmenter(out, model(width=24))
    with pytest.raises(UserError, match="holds no trained segmenter"):
        load_segmenter(out.parent, model())


def test_a_finished_training_is_measured_again_other_tests_included(trained):
    out, result = trained
    before = checkpoint.path_of(out / "checkpoints", 25).stat().st_mtime_ns
    assert run(out) == result
    several = run(out, scales=(0.75, 1.0), flip=True, mode="whole")
    assert several.scales == [0.75, 1.0]
    assert several.miou > 60
    assert checkpoint.path_of(out / "checkpoints", 25).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another training"):
        run(out, lr=0.01)


def test_seeds_and_nothing_else_decide(trained, tmp_path):
    out, result = trained
    torch.manual_seed(99)
    again = run(tmp_path / "again")
    assert replace(again, run=result.run) == result
    states = [checkpoint.load(checkpoint.path_of(x / "checkpoints", 25))["model"] for x in (out, tmp_path / "again")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("preset", ["upernet_small", "fpn_small"])
def test_fine_tuned_networks_train_the_encoder_but_not_the_one_given(tmp_path, preset):
    own = model(depth=4)
    before = encoder_hash(own.encoder)
    # 32 px, as a pyramid's coarsest map needs some cells; one image is smaller than that.
    result = run(tmp_path / "run", preset, Coloured(8), Coloured(2), own, steps=2, warmup=0, crop=32, short=32, lr=1e-3)
    assert result.head == PRESETS[preset].head
    assert 0 <= result.miou <= 100
    assert encoder_hash(own.encoder) == before
    state = checkpoint.load(checkpoint.path_of(tmp_path / "run" / "checkpoints", 2))["model"]
    name = next(n for n in state if n.endswith("patch_embed.proj.weight"))
    assert not torch.equal(state[name], own.encoder.trunk.patch_embed.proj.weight)


def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    result = run(tmp_path / "run", train=Coloured(24, unreadable=(3,)), val=Coloured(6, unreadable=(0, 4)), steps=3)
    assert (result.val_images, result.unreadable) == (4, 2)
    with pytest.raises(UserError, match="coloured: no image can be read"):
        run(tmp_path / "none", val=Coloured(2, unreadable=(0, 1)), steps=3)


def test_small_presets_take_their_size_from_the_encoder():
    own = PRESETS["linear_small"].sized(model())  # trained at 16 px, patches of 4
    assert (own.crop, own.short, own.long, own.stride) == (48, 48, 192, 32)  # 12 patches at least
    large = replace(PRESETS["linear_small"]).sized(replace(model(), size=98))
    assert large.crop == 96


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_presets_hold_together(preset: SegmentationPreset):
    own = preset.sized(model())
    assert preset.train_transform(model()).crop == own.crop
    assert preset.inference(model()).windows == ((own.crop, own.stride) if preset.mode == "slide" else None)
    rate = preset.fit().rate
    assert rate(0) < rate(preset.warmup) > rate(preset.steps - 1) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 18}, "--crop 18: patches have 4 px, give a multiple, such as 16"),
        ({"crop": 16, "stride": 17}, "windows would leave out pixels"),
        ({"steps": 10, "warmup": 10}, "--warmup 10: give fewer steps than the 10"),
        ({"ratio": (2.0, 0.5)}, "--ratio 2.0 0.5: give 0 < smallest <= largest"),
        ({"scales": ()}, "--scales"),
        ({"lr": -1.0}, "--lr -1.0: give a number above 0"),
        ({"blocks": (3,)}, "--blocks 3: name some of this encoder's 1 to 2"),
        ({"batch": 25}, "25"),
        ({"preset": "upernet_small", "crop": 4}, "too small"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_sets_must_have_the_same_classes(tmp_path):
    other = Coloured(4)
    other.classes = ("red", "blue", "green")
    with pytest.raises(UserError, match="do not have the same classes"):
        run(tmp_path / "run", val=other)
    with pytest.raises(UserError, match="no segmentation preset 'linear_smal'; did you mean linear_small"):
        preset_of("linear_smal")


def test_unlabelled_training_images_have_no_most_frequent_class():
    blank = Coloured(2)
    blank.mask = lambda index: np.full((4, 4), IGNORE, np.uint8)
    with pytest.raises(UserError, match="no pixel of coloured has a class"):
        most_frequent(blank)
