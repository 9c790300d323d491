"""Fine-tuning end to end, and what it keeps of the weights it starts from."""

import argparse
from dataclasses import asdict
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer

from triptych import checkpoint
from triptych.data.sources import open_source
from triptych.data.subsets import Subset
from triptych.encoders.load import load_method
from triptych.errors import UserError
from triptych.evals.classify import classify
from triptych.evals.finetune import finetune
from triptych.evals.transform import EvalTransform
from triptych.feed import first_views
from triptych.kept_head import keep_head
from triptych.methods.supervised import Supervised
from triptych.recipe import Recipe, build_method, of_source
from triptych.settings import resolve
from triptych.train import train

COLOURS = {"blue": (80, 80, 160), "green": (80, 160, 80), "grey": (100, 100, 100), "red": (160, 80, 80)}
COLOURS_BY_LABEL = list(COLOURS)
CHANCE = 25.0
VIT = {"encoder.width": 24, "encoder.depth": 2, "encoder.heads": 3, "encoder.patch_size": 8, "views.global_size": 16}
QUICK = {"loader.workers": 0, "loader.colour": "workers", "health.every": 0, "batch": 16}
QUIET = Console(quiet=True)
HIDDEN = 32  # of DINO's head


def recipe(name: str, **more) -> Recipe:
    return resolve(name, None, {**VIT, **QUICK, **{k.replace("__", "."): v for k, v in more.items()}})[0]


def tuning(**more) -> Recipe:
    """Of 16 steps: enough for colours."""
    plain = {"views__colour": "none", "encoder__drop_path": 0, "method__mixup": 0, "method__cutmix": 0}
    plain |= {"method__token": "cls", "optim__lr": 0.02, "optim__warmup": 1, "epochs": 4, "checkpoint__every": 2}
    return recipe("finetune_small", **plain | more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Noisy pictures of four colours, 64 to train on and 32 to test, a run of DINO and one of MAE on them."""
    folder, rng = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                noisy = np.array(colour) + rng.normal(0, 40, (16, 16, 3))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / part / name / f"{i}.png")
    head = {"method__hidden": HIDDEN, "method__embedding": 8, "method__prototypes": 16, "views__local_crops": 0}
    images = open_source(folder / "train")
    train(recipe("dino_small", epochs=1, **head), images, folder / "dino", QUIET)
    decoder = {f"method__decoder_{k}": v for k, v in {"width": 8, "depth": 1, "heads": 2}.items()}
    train(recipe("mae_small", epochs=1, **decoder), images, folder / "mae", QUIET)
    torch.save(official(), folder / "dino.pth")
    return folder


def official(head: str = "head.", bn: bool = False) -> dict:
    """A full checkpoint laid out as DINO's: student, teacher and settings; heads of three layers."""
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    wide = ((0, HIDDEN, 24), (3 if bn else 2, HIDDEN, HIDDEN), (6 if bn else 4, 8, HIDDEN))

    def network(prefix: str) -> dict:
        state = {f"{prefix}backbone.{k}": v for k, v in VisionTransformer(**sizes).state_dict().items()}
        for i, rows, columns in wide:
            state[f"{prefix}{head}mlp.{i}.weight"] = torch.randn(rows, columns) * 0.1
            state[f"{prefix}{head}mlp.{i}.bias"] = torch.randn(rows) * 0.1
        if bn:
            state |= {f"{prefix}{head}mlp.1.{n}": torch.ones(HIDDEN) for n in ("weight", "bias", "running_mean")}
        return state | {f"{prefix}{head}last_layer.weight_v": torch.randn(16, 8)}

    return {"student": network("module."), "teacher": network(""), "epoch": 1, "args": argparse.Namespace(lr=1e-3)}


def parts(place):
    return open_source(place / "train"), open_source(place / "test")


def built(model, images, **more) -> Supervised:
    return cast(Supervised, build_method(of_source(tuning(encoder__weights=str(model), **more), images)))


@pytest.mark.parametrize("projection", [0, HIDDEN])
@pytest.mark.parametrize("model", ["dino", "dino.pth"])
def test_a_few_steps_beat_chance_from_a_run_and_from_an_official_checkpoint(place, tmp_path, model, projection):
    images, test = parts(place)
    tuned = tuning(method__projection=projection)
    result = finetune(str(place / model), images, test, recipe=tuned, out=tmp_path / "run", console=QUIET)
    assert result.top1 > 2 * CHANCE
    assert result.top5 == 100.0  # of four classes
    assert (result.train_images, result.test_images, result.classes, result.size) == (64, 32, 4, 16)
    assert (result.epochs, result.layer_decay, result.projection, result.average_top1) == (4, 0.65, projection, None)
    assert load_method(result.run)[0].encoder.weights == str(place / model)


def test_accuracies_are_those_of_the_last_epoch_and_of_the_average(place, tmp_path):
    """Whatever earlier weights would reach: with the last classifier turned around nearly every image is wrong."""
    images, test = parts(place)
    tuned = tuning(method__average=0.5)
    result = finetune(str(place / "dino"), images, test, recipe=tuned, out=tmp_path / "run", console=QUIET)
    method = cast(Supervised, load_method(tmp_path / "run")[1])
    for average, found in ((False, result.top1), (True, result.average_top1)):
        assert found == classify(method, test, EvalTransform.of(16), average=average).top1["global"]
    folder = tmp_path / "run" / "checkpoints"
    last = checkpoint.steps(folder)[-1]
    assert last == 16
    file = checkpoint.path_of(folder, last)
    state = torch.load(file, weights_only=True)
    for name in ("weight", "bias"):
        state["method"][f"model.head.{name}"] *= -1
    torch.save(state, file)
    turned = finetune(str(place / "dino"), images, test, recipe=tuned, out=tmp_path / "run", console=QUIET)
    assert turned.top1 < CHANCE < result.top1
    assert turned.average_top1 == result.average_top1


def test_the_same_call_goes_on_where_it_was_stopped_to_the_same_bits(place, tmp_path):
    images, test = parts(place)
    started = str(place / "dino")

    def once():
        return finetune(started, images, test, recipe=tuning(), out=tmp_path / "run", console=QUIET)

    def weights():
        return torch.load(checkpoint.path_of(folder, 16), weights_only=True)["method"]

    result, folder = once(), tmp_path / "run" / "checkpoints"
    before = weights()
    checkpoint.path_of(folder, 16).unlink()  # killed after the checkpoint of step 8
    assert checkpoint.steps(folder) == [8]
    assert asdict(once()) == asdict(result)
    assert all(torch.equal(x, before[name]) for name, x in weights().items())


def test_a_share_of_the_labels_is_a_source_like_any_other(place, tmp_path):
    images, test = parts(place)
    few = Subset(images, range(0, 64, 4), " [a quarter]")
    tuned = tuning(epochs=1)
    result = finetune(str(place / "dino"), few, test, recipe=tuned, out=tmp_path / "run", console=QUIET)
    assert (result.train_images, result.test_images) == (16, 32)


def test_a_run_with_repeated_augmentation_sees_every_image_so_many_times_in_a_row(place):
    images, _ = parts(place)
    views = first_views(of_source(tuning(views__repeats=4), images), images, 8, torch.device("cpu"))
    labels, pixels = views.labels.view(4, 4), views.global_crops[0].images.unflatten(0, (4, 4))
    assert torch.equal(labels, labels[:, :1].expand(4, 4))
    assert all(not torch.equal(pixels[:, 0], pixels[:, r]) for r in range(1, 4))
    plain = first_views(of_source(tuning(), images), images, 8, torch.device("cpu"))
    assert not torch.equal(plain.labels, views.labels)


def test_the_kept_projection_is_the_teachers_first_layer(place):
    images, _ = parts(place)
    run = built(place / "dino", images, method__projection=HIDDEN, method__average=0.9)
    head = load_method(place / "dino")[1].teacher.projector[0]
    file = built(place / "dino.pth", images, method__projection=HIDDEN)
    there = official()["teacher"]
    for layer in (run.model.projection, run.average.projection):
        assert torch.equal(layer.weight, head.weight)
        assert torch.equal(layer.bias, head.bias)
    assert torch.equal(file.model.projection.weight, there["head.mlp.0.weight"])
    assert torch.equal(file.model.projection.bias, there["head.mlp.0.bias"])
    qkv = "blocks.0.attn.qkv.weight"
    assert torch.equal(file.model.encoder.vit.state_dict()[qkv], there[f"backbone.{qkv}"])


def test_udis_head_is_found_under_its_other_name(place, tmp_path):
    torch.save(official(head="head.0."), tmp_path / "udi.pth")
    method = built(tmp_path / "udi.pth", parts(place)[0], method__projection=HIDDEN)
    assert torch.equal(method.model.projection.bias, official(head="head.0.")["teacher"]["head.0.mlp.0.bias"])


def test_udis_class_plus_stays_as_a_register(place, tmp_path):
    head = {"method__hidden": HIDDEN, "method__embedding": 8, "method__prototypes": 16, "views__local_crops": 0}
    images, _ = parts(place)
    train(recipe("udi_small", epochs=1, method__window_global=1, **head), images, tmp_path / "udi", QUIET)
    method = built(tmp_path / "udi", images, encoder__registers=1, method__projection=HIDDEN)
    there = load_method(tmp_path / "udi")[1].teacher
    assert torch.equal(method.encoder.vit.reg_token, there.encoder.vit.reg_token)
    assert torch.equal(method.model.projection.weight, there.projector[0].weight)
    with pytest.raises(UserError, match=r"--encoder\.registers"):
        built(tmp_path / "udi", images)


def test_a_fine_tuned_run_goes_on_at_another_size_with_its_classifier(place, tmp_path):
    """As BEiT and MTE do for 384 pixels; the average is what goes on, as everywhere."""
    images, test = parts(place)
    tuned = tuning(method__average=0.5)
    first = finetune(str(place / "dino"), images, test, recipe=tuned, out=tmp_path / "first", console=QUIET)
    more = {"method__classifier": "kept", "method__average": 0.5, "views__global_size": 24}
    started = built(tmp_path / "first", images, **more)
    there = cast(Supervised, load_method(tmp_path / "first")[1])
    for mine in (started.model, started.average):
        assert torch.equal(mine.head.weight, there.average.head.weight)
    still = tuning(optim__lr=0, optim__min_lr=0, epochs=1, **more)
    second = finetune(str(tmp_path / "first"), images, test, recipe=still, out=tmp_path / "second", console=QUIET)
    assert second.size == 24
    assert second.top1 > 2 * CHANCE  # without a step of training
    assert first.top1 > 2 * CHANCE


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("dino", {"method__projection": 31}, r"24 -> 32 there, 24 -> 31 here: --method\.projection 32"),
        ("mae", {"method__projection": HIDDEN}, "has no projection layer"),
        ("backbone.pth", {"method__projection": HIDDEN}, r"looked for teacher\.head\.mlp\.0\.weight"),
        ("bn.pth", {"method__projection": HIDDEN}, "BatchNorm follows"),
        ("dino", {"method__classifier": "kept"}, "no classifier to keep"),
        ("dino.pth", {"method__classifier": "kept"}, "no classifier to keep"),
    ],
)
def test_weights_without_what_is_to_be_kept_are_refused(place, tmp_path, model, settings, said):
    path = place / model
    if model == "backbone.pth":
        path = tmp_path / model
        kept = {k: v for k, v in official()["teacher"].items() if k.startswith("backbone.")}
        torch.save(kept, path)
    elif model == "bn.pth":
        path = tmp_path / model
        torch.save(official(bn=True), path)
    with pytest.raises(UserError, match=said):
        built(path, parts(place)[0], **settings)


def test_an_export_has_no_head_to_keep(place, tmp_path):
    method = built(place / "dino", parts(place)[0], method__projection=HIDDEN)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="is not a Triptych run"):
        keep_head(method, str(tmp_path))


def test_projections_behind_another_activation_are_refused(place, tmp_path):
    head = {"method__hidden": HIDDEN, "method__embedding": 8}
    train(recipe("simclr_small", epochs=1, **head), open_source(place / "train"), tmp_path / "simclr", QUIET)
    with pytest.raises(UserError, match="BatchNorm follows its first projection layer"):
        built(tmp_path / "simclr", parts(place)[0], method__projection=HIDDEN)


@pytest.mark.parametrize("kept", [{"method__projection": HIDDEN}, {"method__classifier": "kept"}])
def test_nothing_can_be_kept_of_no_weights(place, kept):
    with pytest.raises(UserError, match=r"give --encoder\.weights"):
        of_source(tuning(**kept), parts(place)[0])


def test_mistakes_are_said_before_the_training(place, tmp_path):
    images, test = parts(place)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "bare" / "0.png")
    rows = [f"{test.key(i)}\t{COLOURS_BY_LABEL[test.label(i)]}" for i in range(0, 32, 4)]
    (place / "test" / "some.txt").write_text("\n".join([*rows, test.key(1)]))
    other = Subset(test, range(16), " [two]", classes=("blue", "green"))
    for sources, tuned, said in (
        ((images, test), recipe("dino_small"), "without labels: give a recipe of fine-tuning"),
        ((images, other), tuning(), "do not have the same classes"),
        ((open_source(tmp_path / "bare"), test), tuning(), "has no labels"),
        ((images, open_source(tmp_path / "bare")), tuning(), "do not have the same classes"),
        ((images, open_source(place / "test" / "some.txt")), tuning(), "1 of 9 images of .* have no label"),
    ):
        with pytest.raises(UserError, match=said):
            finetune(str(place / "dino"), *sources, recipe=tuned, out=tmp_path / "run", console=QUIET)
    with pytest.raises(UserError, match="no such file"):
        finetune(str(tmp_path / "none"), images, test, recipe=tuning(), out=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
