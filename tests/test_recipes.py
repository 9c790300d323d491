"""Recipes and settings: every recipe builds and trains a step; overrides are checked and remembered."""

import math

import pytest
import torch

from triptych.data.batches import Batches
from triptych.data.loader import ViewDataset, collate
from triptych.data.sources import open_source
from triptych.encoders import SwinConfig
from triptych.errors import UserError
from triptych.methods import METHODS
from triptych.recipe import Recipe, build_method, of_source
from triptych.recipes import RECIPES
from triptych.schedules import Progress
from triptych.settings import flat, nested, parse_overrides, resolve

SMALL_HEADS = {"hidden": 16, "embedding": 8, "prototypes": 32, "queue": 8, "pool_kernel": 3, "blocks": [1, 2]}
SMALL_HEADS |= {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
FROM_WEIGHTS = {"method.projection": 0, "method.classifier": "new"}  # tests/evals/test_finetune.py has some


def toy(name: str) -> Recipe:
    """The recipe with everything that only costs time made small."""
    values = flat(RECIPES[name]().model_dump())
    given = {
        k: SMALL_HEADS[k.split(".")[-1]] for k in values if k.startswith("method.") and k.split(".")[-1] in SMALL_HEADS
    }
    given = {k: v for k, v in given.items() if values[k]}  # a queue that is off stays off
    given |= {k: v for k, v in FROM_WEIGHTS.items() if k in values}
    if values["encoder.name"] == "vit":
        small = {"width": 24, "depth": 2, "heads": 3, "arch": "vit_tiny_patch16_224"}
    else:
        stages = len(values["encoder.depths"] or (0,) * 4)
        small = {"width": 12, "depths": [1] * stages, "heads": [2] * stages}
    given |= {f"encoder.{k}": v for k, v in small.items()} | {"batch": 4}
    return resolve(name, None, given)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step_at_toy_size(name):
    source = open_source("scenes:4")
    recipe = of_source(toy(name), source)
    method = build_method(recipe)
    spec = METHODS[type(recipe.method)].view_spec(recipe.method)
    data = ViewDataset(source, recipe.views, spec, method.encoder.patch_size, recipe.seed)
    views, _ = collate([data[key] for key in next(iter(Batches(4, recipe.batch, 1, 0)))])
    v = recipe.views
    views = views.on_device(torch.device("cpu"), torch.tensor(v.mean), torch.tensor(v.std))
    out = method(views, Progress(0, 10, 2))
    out.loss.backward()
    method.update([out.carry], Progress(0, 10, 2))
    assert out.loss.isfinite()
    assert [len(views.global_crops), len(views.local_crops)] == [v.global_crops, v.local_crops]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_states_its_command_and_status(name):
    text = RECIPES[name].__doc__
    assert f"--recipe {name}" in text
    assert "Status:" in text


def test_the_papers_recipes_say_what_the_papers_say():
    udi, dino = RECIPES["udi_vits16_in1k_300ep"](), RECIPES["dino_vits16_in1k_100ep"]()
    assert (udi.epochs, udi.batch, udi.views.local_crops, udi.optim.lr, udi.optim.min_lr) == (300, 1024, 10, 5e-4, 1e-5)
    assert (udi.optim.weight_decay, udi.optim.weight_decay_end, udi.optim.clip) == (0.04, 0.1, 3.0)
    assert (udi.views.overlap, udi.views.local_reference, udi.method.token_coords) == ("official", "official", "ends")
    assert (udi.method.prototypes, udi.method.window_global, udi.method.window_local, udi.method.alpha) == (
        65536,
        3,
        2,
        0.5,
    )
    assert (dino.epochs, dino.batch, dino.views.local_crops, dino.method.teacher_temp) == (100, 512, 8, 0.04)
    assert dino.method.norm_last_layer
    assert not udi.method.norm_last_layer


def test_the_names_of_recipes_are_their_own():
    assert [make().name for make in RECIPES.values()] == list(RECIPES)


@pytest.mark.parametrize(
    ("name", "batch", "peak", "gamma", "epochs", "warmup"),
    [  # the authors' learning rate at their batch: specs of UDI, MTE and MMC, and the released commands
        ("finetune_mae_vitb16_in1k_100ep", 1024, 2e-3, 0.65, 100, 5),
        ("finetune_ibot_vits16_in1k_200ep", 1024, 4e-3, 0.75, 200, 20),
        ("finetune_ibot_vitb16_in1k_100ep", 1024, 4e-3, 0.65, 100, 20),
        ("finetune_udi_vits16_in1k_200ep", 1024, 1e-3, 0.55, 200, 20),
        ("finetune_mte_vits16_in1k_100ep", 1024, 2e-3, 0.75, 100, 20),
        ("finetune_mte_vitb16_in1k_200ep", 1024, 2e-3, 0.60, 200, 20),
        ("finetune_mte_vitb16_384px_in1k_30ep", 512, 2e-5, 0.85, 30, 5),
        ("finetune_mmc_vitb16_in1k_100ep", 256, 5e-4, 0.65, 100, 5),
        ("finetune_mmc_vitb16_200ep", 128, 5e-4, 0.65, 200, 5),
        ("finetune_vits16_in100_200ep", 128, 5e-4, 0.65, 200, 5),
        ("lowshot_ibot_vits16", 1024, 5e-6 * 2, 1.0, 1000, 5),
        ("lowshot_udi_vits16", 512, 5e-6, 1.0, 1000, 5),
        ("transfer_cifar10_ibot_vitb16", 768, 7.5e-6 * 1.5, 1.0, 1000, 5),
        ("transfer_cifar10_udi_vits16", 768, 5e-6 * 1.5, 1.0, 1000, 5),
        ("transfer_cars_udi_vits16", 768, 7.5e-5 * 1.5, 1.0, 1000, 5),
        ("transfer_inat18_udi_vits16", 768, 3e-5 * 1.5, 1.0, 360, 5),
        ("transfer_inat19_ibot_vitb16", 768, 7.5e-6 * 1.5, 1.0, 360, 5),
    ],
)
def test_fine_tuning_has_the_authors_rates(name, batch, peak, gamma, epochs, warmup):
    recipe = RECIPES[name]()
    lr, decay = recipe.optim.rates(recipe.batch)
    steps, total = 1000, 1000 * epochs
    at_peak = Progress(warmup * steps, total, steps)
    timm, beit = name.startswith(("lowshot", "transfer")), any(f"_{w}_" in name for w in ("ibot", "udi", "mte"))
    assert recipe.optim.schedule == ("moby" if timm else "dino" if beit else "mocov3")  # whose warm-up it is
    if timm:  # the cosine has begun by then
        floor = recipe.optim.min_lr
        peak = floor + (peak - floor) * (1 + math.cos(math.pi * warmup / epochs)) / 2
    assert lr(at_peak) == pytest.approx(peak)
    start = 1e-6 if "udi" in name or "ibot" in name or "mte" in name else 0.0
    assert lr(Progress(0, total, steps)) == pytest.approx(start)
    assert decay(at_peak) == pytest.approx(1e-8 if "384" in name else 0.05)
    assert (recipe.batch, recipe.epochs) == (batch, epochs)
    assert (recipe.optim.layer_decay, recipe.optim.decay, recipe.optim.clip) == (gamma, "no_tokens", None)


def test_fine_tuning_reads_and_starts_what_the_authors_do():
    made = {name: make() for name, make in RECIPES.items() if name.startswith(("finetune", "lowshot", "transfer"))}
    tokens = {"mae": "patch_mean", "mmc": "cls+patch_mean", "ibot": "cls", "udi": "cls", "mte": "cls"}
    for name, recipe in made.items():
        whose = next((w for w in tokens if w in name.split("_")), "mmc")
        method = recipe.method
        assert (method.token, method.fc_norm) == (tokens[whose], whose == "mae"), name
        assert method.projection == (2048 if "lowshot" in name else 0), name
        assert recipe.views.repeats == (3 if "transfer" in name or "lowshot_ibot" in name else 1), name
        assert method.average == (0.0 if "finetune" in name else 0.99996), name
        assert recipe.encoder.registers == (1 if whose == "udi" else 0), name
        assert (method.classifier == "kept", recipe.views.global_size == 384) == ("384" in name, "384" in name), name
    erased = {name: made[f"transfer_{name}"].method.erase for name in ("cifar10_ibot_vitb16", "inat18_ibot_vitb16")}
    assert erased == {"cifar10_ibot_vitb16": 0.25, "inat18_ibot_vitb16": 0.1}
    assert made["finetune_vits16_in100_200ep"].views.colour == "three_augment"
    assert made["finetune_mmc_vitb16_in1k_100ep"].views.colour == "randaug"


def test_overrides_win_over_the_file_which_wins_over_the_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method:\n  alpha: 0.2\n  student_temp: 0.2\nepochs: 7\n")
    recipe, origin = resolve("udi_small", file, {"method.alpha": 0.9})
    assert (recipe.method.alpha, recipe.method.student_temp, recipe.epochs) == (0.9, 0.2, 7)
    assert origin["method.alpha"] == "command line"
    assert origin["method.student_temp"] == str(file)
    assert origin["batch"] == "recipe udi_small"
    assert origin["method.blend"] == "default"


def test_another_method_keeps_what_both_have():
    recipe, _ = resolve("udi_small", None, {"method.name": "dino"})
    assert type(recipe.method).__name__ == "DINOConfig"
    assert recipe.method.prototypes == RECIPES["udi_small"]().method.prototypes
    assert recipe.method.norm_last_layer == RECIPES["udi_small"]().method.norm_last_layer
    with pytest.raises(UserError, match=r"no setting 'method\.alpha'"):
        resolve("udi_small", None, {"method.name": "dino", "method.alpha": 0.3})


def test_another_method_has_defaults_of_its_own():
    recipe, origin = resolve("mmc_small", None, {"method.name": "sit", "method.corruption.align": 8})
    corruption = recipe.method.corruption
    assert (corruption.kinds, corruption.share, corruption.align) == (("zeros",), 0.5, 8)  # MMC's: noise, 0.75
    assert recipe.method.hidden == RECIPES["mmc_small"]().method.hidden  # the recipe's choice
    assert origin["method.corruption.share"] == "default"


def test_mte_takes_over_the_settings_of_what_it_wraps():
    recipe, origin = resolve("dino_small", None, {"method.name": "mte", "method.pooled": 2, "method.base.hidden": 64})
    small = RECIPES["dino_small"]().method
    assert recipe.method.base == small.model_copy(update={"hidden": 64})
    assert (recipe.method.pooled, recipe.method.aux) == (2, 4)
    assert origin["method.pooled"] == "command line"
    other, _ = resolve("dino_small", None, {"method.name": "mte", "method.base.name": "ibot"})
    assert (other.method.base.name, other.method.base.prototypes) == ("ibot", small.prototypes)
    back, _ = resolve("mte_dino_small", None, {"method.base.name": "byol", "views.local_crops": 0})
    assert back.method.base.name == "byol"


def test_another_encoder_starts_from_its_own_sizes():
    recipe, origin = resolve("dino_small", None, {"encoder.name": "swin", "encoder.width": 24})
    assert recipe.encoder == SwinConfig(width=24)
    assert origin["encoder.arch"] == "default"


@pytest.mark.parametrize("base", ["mte", "supervised", "mae"])
def test_mte_refuses_what_has_no_loss_between_two_views(base):
    with pytest.raises(UserError, match=rf"no base of mte '{base}'.* dino, ibot, mocov3"):
        resolve("mte_dino_small", None, {"method.base.name": base})


def test_settings_at_odds_are_said_plainly():
    with pytest.raises(UserError, match=r"^recipe: method: auxiliary tokens are needed") as error:
        resolve("mte_dino_small", None, {"method.aux": 0, "method.pooled": 0})
    assert "{" not in str(error.value)


def test_methods_refuse_crops_that_they_make_no_use_of():
    for name, wrong, said in (
        ("byol_small", {"views.local_crops": 2}, "byol makes no use of local crops"),
        ("mte_byol_small", {"views.local_crops": 2}, "byol makes no use of local crops"),
        ("dino_small", {"views.global_crops": 1}, "dino compares 2 of them"),
        ("supervised_small", {"views.global_crops": 2}, "takes one view of an image"),
        ("moby_small", {"method.queue": 32}, "shorter than a step's batch of 64"),
        ("mte_moby_small", {"method.aux": 4}, r"--method\.aux 0"),
    ):
        with pytest.raises(UserError, match=said):
            build_method(of_source(resolve(name, None, wrong)[0], open_source("scenes:4")))


def test_supervised_training_takes_the_number_of_classes_from_the_data():
    recipe, _ = resolve("supervised_small", None, {})
    scenes = open_source("scenes:4")
    assert of_source(recipe, scenes).method.classes == len(scenes.classes)
    wrong, _ = resolve("supervised_small", None, {"method.classes": 7})
    with pytest.raises(UserError, match="classes; leave the setting out"):
        of_source(wrong, scenes)


def test_words_become_values():
    words = "--epochs 50 --method.alpha=0.3 --optim.lr 1e-3 --views.global-scale 0.2 1 --optim.clip null".split()
    values = parse_overrides(words)
    assert values["views.global_scale"] == [0.2, 1]
    recipe, _ = resolve("udi_small", None, values)
    assert (recipe.epochs, recipe.method.alpha, recipe.optim.lr) == (50, 0.3, 1e-3)
    assert recipe.views.global_scale == (0.2, 1.0)
    assert recipe.optim.clip is None
    for wrong in (["stray"], ["--epochs"]):
        with pytest.raises(UserError):
            parse_overrides(wrong)


def test_a_recipe_survives_yaml(tmp_path):
    import yaml

    for name, make in RECIPES.items():
        text = yaml.safe_dump(make().model_dump(mode="json"))
        assert Recipe.model_validate(yaml.safe_load(text)) == make(), name
    assert nested(flat({"a": {"b": 1}, "c": 2})) == {"a": {"b": 1}, "c": 2}


def test_the_dotted_names_are_frozen():
    """A new or renamed setting is a change that users see: it belongs in the changelog, and here."""
    names = set(flat(RECIPES["udi_small"]().model_dump()))
    groups = {n.split(".")[0] for n in names}
    assert groups == {
        *("name", "method", "encoder", "views", "optim", "batch", "accumulate", "epochs", "seed", "precision"),
        *("compile", "loader", "health", "checkpoint"),
    }
    assert {n for n in names if n.startswith("views.")} == {
        f"views.{n}"
        for n in "global_crops interpolation global_size local_size local_crops global_scale local_scale overlap local_reference flip colour blur_scale repeats mean std".split()
    }


def test_a_single_value_will_do_for_a_list():
    recipe, _ = resolve("sit_small", None, {"method.corruption.kinds": "noise", "views.local_crops": 0})
    assert recipe.method.corruption.kinds == ("noise",)
    recipe, _ = resolve("mte_mmc_small", None, {"method.base.pixel_blocks": 6})
    assert recipe.method.base.pixel_blocks == (6,)
    with pytest.raises(UserError, match=r"method\.weights = .*3 values are needed"):
        resolve("mmc_small", None, {"method.weights": [1, 1]})


@pytest.mark.parametrize("name", ["method.name", "encoder.name", "method.base.name"])
def test_two_names_where_one_is_meant_are_refused(name):
    with pytest.raises(UserError, match=r"takes one name, not \['mte', 'mmc'\]"):
        resolve("mte_mmc_small", None, {name: ["mte", "mmc"]})


def test_infinite_settings_are_refused():
    with pytest.raises(UserError, match="finite"):
        resolve("mmc_small", None, {"method.temperature": float("inf")})
