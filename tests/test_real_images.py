"""Photographs of shared/data: present on the team's machines and in CI, never in the repository."""

from pathlib import Path

import pytest
import torch

from conftest import tiny_encoder
from triptych.data.batches import Batches
from triptych.data.loader import LoaderConfig, ViewDataset, ViewsConfig, make_loader
from triptych.data.sources import open_source
from triptych.data.subsets import Subset
from triptych.data.views import ViewSpec
from triptych.evals.features import extract, labels_of
from triptych.evals.knn import knn
from triptych.evals.transform import EvalTransform
from triptych.tokens import TokenSpec

DATA = Path(__file__).parents[2] / "shared" / "data" / "imagenette128"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not on this machine")


def test_a_real_zip_is_a_labelled_source():
    train, val = (open_source(DATA / f"{split}.zip") for split in ("train", "val"))
    assert (len(train), len(val)) == (9469, 3925)
    assert train.classes == val.classes
    assert len(train.classes) == 10
    assert sorted({train.label(i) for i in range(len(train))}) == list(range(10))


def test_views_of_photographs_keep_their_colours_on_average():
    """The mean over many crops is near the mean over the whole images: nothing is clipped, swapped or shifted."""
    source = Subset(open_source(DATA / "train.zip"), range(0, 9469, 150), "")
    config = ViewsConfig(global_size=48, local_size=24, local_crops=2, colour="none", overlap="fixed")
    dataset = ViewDataset(source, config, ViewSpec(2, 1), patch_size=8, seed=0)
    batches = Batches(len(source), 32, 2, 0)
    views = [v for v, bad in make_loader(dataset, batches, LoaderConfig(workers=0), pin=False) if not bad]
    crops = torch.cat([v.global_crops[0].images for v in views]).float().mean((0, 2, 3))
    whole = torch.stack([EvalTransform(128, 128).pixels(source.image(i).convert("RGB")) for i in range(len(source))])
    torch.testing.assert_close(crops, whole.float().mean((0, 2, 3)), rtol=0, atol=8)


def test_even_an_untrained_encoder_tells_photographs_apart_better_than_chance():
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(), image=32, patch=8, width=48)
    features, labels = [], []
    for split, step in (("train", 20), ("val", 30)):
        archive = open_source(DATA / f"{split}.zip")
        source = Subset(archive, range(0, len(archive), step), "")
        x, indices = extract(encoder, source, EvalTransform.of(32), workers=0)
        features.append(x)
        labels.append(labels_of(source, indices))
    result = knn(features[0], labels[0], features[1], labels[1], k=[10])
    assert result.top1[10] > 15  # chance is 10
