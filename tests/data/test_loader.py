"""From files to batches: order, boxes, pixels, unreadable files."""

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.data.loader import (
    Batches,
    LoaderConfig,
    ViewDataset,
    ViewsConfig,
    check_batch,
    make_loader,
)
from triptych.data.sources import open_source
from triptych.data.views import ViewSpec, token_positions
from triptych.errors import UserError

PLAIN = ViewsConfig(global_size=32, local_size=16, local_crops=2, colour="none", overlap="fixed")


def dataset(folder, config=PLAIN, windows=(2, 1), seed=0) -> ViewDataset:
    return ViewDataset(open_source(folder), config, ViewSpec(*windows), patch_size=8, seed=seed)


@pytest.fixture
def gradients(tmp_path):
    """Images whose red is the row and whose green is the column, 0..255: a crop shows where it comes from."""
    for i in range(6):
        height, width = 96 + 16 * i, 128
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack([(y + 0.5) / height, (x + 0.5) / width, np.zeros((height, width))], -1) * 255
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_view_shows_what_its_box_says(gradients):
    """Flips, steering and resizing included: every patch's mean colour is its centre's position in the image."""
    data, flipped = dataset(gradients), 0
    for index in range(6):
        for epoch in range(5):
            sample = data[epoch, index]
            for pixels, box in zip(sample.pixels, sample.boxes, strict=True):
                n = pixels.shape[0] // 8
                colours = pixels.double().view(n, 8, n, 8, 3).mean((1, 3)).reshape(-1, 3) / 255
                expected = token_positions(box[None].double(), (n, n))[0]
                torch.testing.assert_close(colours[:, :2], expected, rtol=0, atol=0.02)
                flipped += int(box[1] > box[3])
    assert 20 < flipped < 100  # of 120


def test_a_sample_depends_on_seed_epoch_and_index_alone(gradients):
    config = PLAIN.model_copy(update={"colour": "udi"})
    first, again = dataset(gradients, config)[3, 2], dataset(gradients, config)[3, 2]
    assert all(torch.equal(a, b) for a, b in zip(first.pixels, again.pixels, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.samples, again.samples, strict=True))
    for other in (dataset(gradients, config)[4, 2], dataset(gradients, config, seed=1)[3, 2]):
        assert not torch.equal(first.boxes[0], other.boxes[0])


def test_global_views_share_one_pattern_and_local_views_another(gradients):
    sample = dataset(gradients)[0, 0]
    a, b, c, d = sample.samples
    assert torch.equal(a, b)
    assert torch.equal(c, d)
    assert len(a) == 4  # 4x4 tokens in windows of 2
    assert len(c) == 4  # 2x2 tokens in windows of 1
    assert dataset(gradients, windows=(0, 0))[0, 0].samples == [None] * 4


def test_batches_are_the_epochs_permutation_and_can_start_anywhere():
    whole = list(Batches(images=10, batch=3, epochs=2, seed=5))
    assert len(whole) == 6
    for epoch in range(2):
        taken = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in taken} == {epoch}
        assert len({i for _, i in taken}) == 9
    assert [b[0][1] for b in whole[:3]] != [b[0][1] for b in whole[3:]]
    assert list(Batches(images=10, batch=3, epochs=2, seed=5, start=4)) == whole[4:]
    assert len(Batches(images=10, batch=3, epochs=2, seed=5, start=4)) == 2


def test_processes_and_accumulated_parts_share_out_one_batch():
    whole = list(Batches(images=20, batch=8, epochs=1, seed=0))
    parts = [list(Batches(20, 8, 1, 0, accumulate=2, rank=r, world=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        joint = [key for part in range(2) for r in range(2) for key in parts[r][2 * step + part]]
        assert joint == batch


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_a_batch(gradients, workers):
    batches = Batches(images=6, batch=2, epochs=1, seed=0)
    reference = list(make_loader(dataset(gradients), batches, LoaderConfig(workers=0), pin=False))
    loaded = list(make_loader(dataset(gradients), batches, LoaderConfig(workers=workers), pin=False))
    assert len(loaded) == 3
    for (a, _), (b, _) in zip(reference, loaded, strict=True):
        for x, y in zip(a.all, b.all, strict=True):
            assert torch.equal(x.images, y.images)
            assert torch.equal(x.box, y.box)


def test_normalisation_happens_on_the_device(gradients):
    views, _ = next(iter(make_loader(dataset(gradients), Batches(6, 2, 1, 0), LoaderConfig(workers=0), pin=False)))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    floats = views.on_device(torch.device("cpu"), mean, std)
    expected = (views.all[0].images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert views.all[0].images.dtype == torch.uint8
    torch.testing.assert_close(floats.all[0].images, expected)


def test_an_unreadable_file_is_replaced_by_the_next_and_named(gradients):
    (gradients / "2.png").write_bytes(b"broken")
    sample = dataset(gradients)[0, 2]
    (name,) = sample.unreadable
    assert name.startswith("2.png")
    assert sample.pixel[0] == pytest.approx(1 / (96 + 16 * 3))  # image 3 stands in


def test_a_folder_of_unreadable_files_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="3 images in a row"):
        dataset(tmp_path)[0, 0]


def test_batches_that_cannot_be_filled_or_shared_are_refused():
    with pytest.raises(UserError, match="set --batch lower"):
        check_batch(images=10, batch=11, accumulate=1, world=1)
    with pytest.raises(UserError, match="does not divide"):
        check_batch(images=100, batch=10, accumulate=2, world=3)
