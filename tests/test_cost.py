"""What parts cost, against the numbers that are known of ViT-S/16, Swin-T and MTE."""

import pytest
import torch

from triptych.cost import Cost, cost, count, measure
from triptych.errors import UserError
from triptych.methods import METHODS
from triptych.recipe import build_method
from triptych.recipes import RECIPES
from triptych.settings import resolve

G = 1e9


@pytest.fixture(scope="module")
def mte_ibot() -> Cost:
    return cost(RECIPES["mte_ibot_vits16_in1k_100ep"]())


def macs(c: Cost) -> dict[str, float]:
    return {p.name: p.macs / G for p in c.parts}


def test_ibot_on_vits16_takes_the_papers_6_1_g():
    c = cost(RECIPES["ibot_vits16_in1k_100ep"](), 224)
    assert c.inference_macs / G == pytest.approx(4.598, rel=1e-3)
    assert (c.macs() - c.inference_macs) / G == pytest.approx(1.498, rel=1e-3)  # the head on all 197 tokens
    assert c.macs() / G == pytest.approx(6.096, rel=1e-3)
    assert any("masked ones" in note for note in c.notes)


def test_the_parts_that_mte_adds_and_both_ways_to_sum_them(mte_ibot):
    part = macs(mte_ibot)
    assert part["TEN"] == pytest.approx(0.064, rel=0.01)
    assert part["10 auxiliary heads"] == pytest.approx(0.055, rel=0.01)
    assert part["prototypes of the fused vector"] == pytest.approx(0.0021, rel=0.01)
    assert part["6 pooled tokens"] == pytest.approx(0.229, rel=0.01)
    assert mte_ibot.macs("base", "tokens") / G == pytest.approx(6.42, rel=0.001)
    assert mte_ibot.macs() / G == pytest.approx(6.55, rel=0.003)


def test_auxiliary_tokens_in_one_attention_over_all_tokens_cost_0_100_g_and_less_as_their_own_stream(mte_ibot):
    recipe, _ = resolve("mte_ibot_vits16_in1k_100ep", None, {"method.aux_sees": "uncut"})
    joint = cost(recipe)
    assert macs(joint)["4 auxiliary class tokens"] == pytest.approx(0.100, rel=0.01)
    assert macs(mte_ibot)["4 auxiliary class tokens"] == pytest.approx(0.0923, rel=0.01)
    assert any("they take 0.100 G" in note for note in mte_ibot.notes)
    assert not any("they take" in note for note in joint.notes)


def test_what_is_removed_after_training_costs_nothing_at_inference(mte_ibot):
    base = cost(RECIPES["ibot_vits16_in1k_100ep"]())
    assert mte_ibot.inference_macs == base.inference_macs
    assert mte_ibot.inference_parameters == base.inference_parameters == 21_665_664  # timm's vit_small_patch16_224
    assert mte_ibot.macs("base") == base.macs()
    assert mte_ibot.training_only_parameters - base.training_only_parameters == pytest.approx(58.04e6, rel=0.001)


@pytest.mark.parametrize("name", ["dino_swint_in1k_100ep", "moby_swint_in1k_100ep"])
def test_swin_t_takes_its_official_4_5_g(name):
    assert cost(RECIPES[name]()).inference_macs / G == pytest.approx(4.5, rel=0.01)


SMALL = [name for name in RECIPES if name.endswith("_small")]


def test_the_small_recipes_hold_every_method():
    assert {type(RECIPES[name]().method) for name in SMALL} == set(METHODS)


@pytest.mark.parametrize("name", SMALL)
def test_parts_and_copies_are_all_parameters_of_every_method(name):
    recipe = RECIPES[name]()
    c = cost(recipe)
    if recipe.method.name == "supervised":
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"classes": 1000})})
    with torch.device("meta"):
        method = build_method(recipe)
    assert sum(p.parameters for p in c.parts) + c.copies == count(method)
    assert c.trained == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert len({p.name for p in c.parts}) == len(c.parts)
    assert [p.name for p in c.parts if p.kept] == ["encoder"]
    assert all(p.macs for p in c.parts if p.name != "mask token")
    assert [row[0] for row in c.rows()[: len(c.parts)]] == [p.name for p in c.parts]


def test_the_ensembles_parts_are_the_whole_ensemble():
    """The parts are read off one call of the ensemble: none of its products may be missing."""
    from triptych.cost import _ensemble_parts

    with torch.device("meta"):
        method = build_method(RECIPES["mte_dino_small"]()).eval().requires_grad_(False)
        x = method.student.encoder(torch.empty(1, 3, 64, 64))
    parts, _ = _ensemble_parts(method.student_ensemble, x)
    assert sum(p.macs for p in parts) == measure(lambda: method.student_ensemble([x]))[0]


def test_a_measured_product_is_rows_times_columns_times_depth():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert measure(lambda: a @ b)[0] == 3 * 5 * 7
    depthwise = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, device="meta")
    assert measure(lambda: depthwise(torch.empty(1, 4, 6, 6, device="meta")))[0] == 4 * 36 * 9


def test_prototypes_of_patches_are_a_part_of_their_own():
    recipe, _ = resolve("ibot_small", None, {"method.patch_prototypes": 512})
    part, shared = macs(cost(recipe)), macs(cost(RECIPES["ibot_small"]()))
    embedding = recipe.method.embedding
    assert part["prototypes of patches"] * G == 64 * 512 * embedding  # 8 x 8 patches
    assert part["prototypes"] * G == RECIPES["ibot_small"]().method.prototypes * embedding
    assert shared["prototypes"] == pytest.approx(65 * part["prototypes"])


def test_another_size_is_measured_at_that_size_and_a_wrong_one_refused():
    recipe = RECIPES["dino_small"]()
    assert cost(recipe, 128).inference_macs > 4 * cost(recipe, 64).inference_macs  # attention grows faster
    with pytest.raises(UserError, match="65x65"):
        cost(recipe, 65)


def test_weights_to_start_from_are_not_needed():
    recipe = RECIPES["dino_small"]()
    encoder = recipe.encoder.model_copy(update={"weights": "nowhere.pt"})
    assert cost(recipe.model_copy(update={"encoder": encoder})).parts == cost(recipe).parts


def test_what_reconstructs_pixels_and_what_is_dropped():
    mae = macs(cost(RECIPES["mae_vitb16_in1k_800ep"]()))
    assert mae["encoder"] == pytest.approx(17.56, rel=0.001)  # ViT-B/16
    assert mae["encoder"] + mae["147 dropped patches"] == pytest.approx(17.56 * 49 / 196, rel=0.05)
    assert mae["decoder"] > 0
    mmc = macs(cost(RECIPES["mmc_vits16_in100_200ep"]()))
    assert mmc["patch head on 196 patches"] == pytest.approx(196 * 19.4e-3, rel=0.01)  # 19.4 M per token
    assert mmc["pixel head"] == pytest.approx(196 * (3 * 384**2 + 384 * 768) / G, rel=0.01)
    assert "prototypes of patches" in macs(cost(RECIPES["mcssl_small"]()))
    assert macs(cost(RECIPES["msn_small"]()))["prototypes"] > 0
    assert set(macs(cost(RECIPES["gmml_small"]()))) == {"encoder", "pixel head"}


def test_a_classifier_of_two_tokens_is_counted_whole():
    recipe, _ = resolve("finetune_small", None, {"method.classes": 10})
    assert macs(cost(recipe))["classifier of the global token"] == pytest.approx(2 * 192 * 10 / G)
