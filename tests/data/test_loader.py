"""From files to batches: order, boxes, pixels, unreadable files."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from triptych.data.batches import Batches, check_batch
from triptych.data.loader import LoaderConfig, ViewDataset, ViewsConfig, collate, make_loader
from triptych.data.pixels import Picture
from triptych.data.sources import open_source
from triptych.data.views import MaskSpec, Views, ViewSpec, token_positions
from triptych.errors import UserError

PLAIN = ViewsConfig(global_size=32, local_size=16, local_crops=2, colour="none", overlap="fixed")


def dataset(folder, config=PLAIN, windows=(2, 1), seed=0, **spec) -> ViewDataset:
    return ViewDataset(open_source(folder), config, ViewSpec(*windows, **spec), patch_size=8, seed=seed)


@pytest.fixture
def gradients(tmp_path):
    """Images whose red is the row and whose green is the column, 0..255: a crop shows where it comes from."""
    for i in range(6):
        height, width = 96 + 16 * i, 128
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack([(y + 0.5) / height, (x + 0.5) / width, np.zeros((height, width))], -1) * 255
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def classes(gradients):
    """The same images, the first three of class a and the others of class b."""
    for i in range(6):
        folder = gradients / ("a" if i < 3 else "b")
        folder.mkdir(exist_ok=True)
        (gradients / f"{i}.png").rename(folder / f"{i}.png")
    return gradients


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


def test_repeated_augmentation_shows_a_third_of_the_images_three_times(gradients):
    """DeiT's rule: the permutation with every image three times in a row, cut off at the epoch's usual length."""
    once, thrice = (Batches(images=12, batch=6, epochs=2, seed=5, repeats=r) for r in (1, 3))
    order = [i for batch in list(once)[:2] for _, i in batch]
    assert list(thrice)[:2] == [[(0, i, r) for i in order[n : n + 2] for r in range(3)] for n in (0, 2)]
    assert len(list(thrice)) == len(list(once)) == 4
    assert list(Batches(images=12, batch=6, epochs=2, seed=5, start=3, repeats=3)) == list(thrice)[3:]
    data = dataset(gradients)
    boxes = [data[0, 2, r].boxes[0] for r in range(3)]
    assert not torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[1], boxes[2])
    assert torch.equal(boxes[1], data[0, 2, 1].boxes[0])


def test_processes_and_accumulated_parts_share_out_one_batch():
    whole = list(Batches(images=20, batch=8, epochs=1, seed=0))
    parts = [list(Batches(20, 8, 1, 0, accumulate=2, rank=r, world=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        joint = [key for part in range(2) for r in range(2) for key in parts[r][2 * step + part]]
        assert joint == batch


def tensors(views: Views) -> list[torch.Tensor]:
    every = [views.labels, *(x for view in views.all for x in vars(view).values())]
    return [x for x in every if x is not None]


@pytest.mark.parametrize("colour", ["udi", "randaug"])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_a_batch(classes, workers, colour):
    data = dataset(classes, PLAIN.model_copy(update={"colour": colour}), mask=MaskSpec(), labels=True)
    batches = Batches(images=6, batch=2, epochs=1, seed=0)
    reference = [collate([data[key] for key in keys])[0] for keys in batches]
    loaded = list(make_loader(data, batches, LoaderConfig(workers=workers), pin=False))
    assert len(loaded) == 3
    for a, (b, _) in zip(reference, loaded, strict=True):
        assert len(tensors(a)) == 21  # 4 views of 4 tensors, 2 masks in two forms, the labels
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_colours_can_be_left_to_the_device(gradients, workers):
    """Everything else is the same, whatever the workers; the pixels agree within rounding, op by op."""
    config = PLAIN.model_copy(update={"colour": "udi"})
    here, left = dataset(gradients, config, mask=MaskSpec()), dataset(gradients, config, mask=MaskSpec())
    left.colour_on_device = True
    batches = Batches(images=6, batch=6, epochs=4, seed=0)
    mean, std, changed = torch.zeros(3), torch.full((3,), 1 / 255), 0  # so that pixels come out in grey levels
    for keys, (given, _) in zip(
        batches, make_loader(left, batches, LoaderConfig(workers=workers), pin=False), strict=True
    ):
        expected = collate([here[key] for key in keys])[0].on_device(torch.device("cpu"), mean, std)
        ours = given.on_device(torch.device("cpu"), mean, std)
        for a, b, raw in zip(expected.all, ours.all, given.all, strict=True):
            assert raw.colours is not None
            assert b.colours is None
            changed += int((raw.images != b.images).any())
            for name in ("box", "pixel", "samples", "mask"):
                x, y = getattr(a, name), getattr(b, name)
                assert (x is None and y is None) or torch.equal(x, y)
            difference = (a.images - b.images).abs()
            assert difference.mean() < 1
            assert difference.flatten(1).quantile(0.99, 1).max() <= 8
    assert changed > 10


def test_samples_do_not_change_from_version_to_version(tmp_path):
    """Boxes, samples, masks and what is drawn of colours: a run that goes on with a newer version sees the same."""
    for i in range(3):
        Image.new("RGB", (300 + 17 * i, 200 + 31 * i)).save(tmp_path / f"{i}.png")
    config = ViewsConfig(global_size=64, local_size=32, local_crops=3, overlap="fixed", colour="udi", blur_scale=0.5)
    data = dataset(tmp_path, config, windows=(3, 2), seed=7, mask=MaskSpec(), drop=0.5)
    data.colour_on_device = True
    digest = hashlib.blake2b(digest_size=8)
    for key in ((0, 0), (1, 2), (5, 1)):
        sample = data[key]
        for numbers in (*sample.boxes, *sample.colours):
            digest.update((numbers.double() * 1000).round().long().numpy().tobytes())
        for numbers in (*sample.samples, *sample.masks, *sample.keeps):
            digest.update(numbers.long().numpy().tobytes())
    assert digest.hexdigest() == "eafcd80c172fd587"


def test_normalisation_happens_on_the_device(gradients):
    views, _ = next(iter(make_loader(dataset(gradients), Batches(6, 2, 1, 0), LoaderConfig(workers=0), pin=False)))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    floats = views.on_device(torch.device("cpu"), mean, std)
    expected = (views.all[0].images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert views.all[0].images.dtype == torch.uint8
    torch.testing.assert_close(floats.all[0].images, expected)


def test_masks_cover_global_crops_alone_and_change_nothing_else(gradients):
    config = PLAIN.model_copy(update={"colour": "udi"})
    keys = [(epoch, i) for epoch in range(8) for i in range(6)]
    plain, masked = dataset(gradients, config), dataset(gradients, config, mask=MaskSpec())
    without, _ = collate([plain[key] for key in keys])
    views, _ = collate([masked[key] for key in keys])
    first, second = (view.mask for view in views.global_crops)
    assert first is not None
    assert second is not None
    assert (first.shape, first.dtype) == ((48, 16), torch.bool)  # 32 pixels are 4 x 4 patches
    assert not torch.equal(first, second)
    shares = torch.cat([first, second]).float().mean(1)
    assert shares.max() <= 0.5
    assert 0.3 < (shares > 0).float().mean() < 0.7
    assert [view.mask for view in [*views.local_crops, *without.all]] == [None] * 6
    for a, b in zip(without.all, views.all, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.box, b.box)
        assert torch.equal(a.samples, b.samples)


def test_labels_reach_the_batch_and_are_moved_with_it(classes):
    data = dataset(classes, labels=True)
    views, _ = collate([data[0, i] for i in (5, 0, 3, 1)])
    assert views.labels.tolist() == [1, 0, 1, 0]
    assert views.labels.dtype == torch.int64
    assert views.map(lambda x: x[:3]).labels.tolist() == [1, 0, 1]
    moved = views.on_device(torch.device("cpu"), torch.full((3,), 0.5), torch.full((3,), 0.5))
    assert torch.equal(moved.labels, views.labels)
    assert collate([dataset(classes)[0, 0]])[0].labels is None


def test_the_label_is_that_of_the_image_that_stands_in(classes):
    (classes / "a" / "2.png").write_bytes(b"broken")
    sample = dataset(classes, labels=True)[0, 2]
    assert sample.unreadable
    assert sample.label == 1  # image 3, the first of class b


def test_a_source_without_labels_is_refused_before_the_first_image(gradients, tmp_path):
    with pytest.raises(UserError, match="has no labels: put the images of each class in a sub-folder of its own"):
        dataset(gradients, labels=True)
    listed = tmp_path / "some.txt"
    listed.write_text("0.png\tcat\n1.png\tdog\n2.png\n")
    with pytest.raises(UserError, match=r"1 of 3 images of .*some.txt have no label, the first: 2.png"):
        dataset(listed, labels=True)


@pytest.mark.parametrize("local_crops", [0, 2])
def test_one_global_crop_is_the_first_of_two(gradients, local_crops):
    """Local crops are then steered to its box; with none there is one view per image."""
    config = PLAIN.model_copy(update={"global_crops": 1, "local_crops": local_crops})
    views, _ = collate([dataset(gradients, config, mask=MaskSpec())[0, i] for i in range(6)])
    pairs, _ = collate([dataset(gradients)[0, i] for i in range(6)])
    assert (len(views.global_crops), len(views.local_crops)) == (1, local_crops)
    assert views.global_crops[0].mask is not None
    assert torch.equal(views.global_crops[0].images, pairs.global_crops[0].images)
    assert [view.images.shape[-1] for view in views.local_crops] == [16] * local_crops


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_crops_are_resized_with_the_interpolation_asked_for(gradients, name):
    data = dataset(gradients, PLAIN.model_copy(update={"interpolation": name, "flip": 0.0}))
    sample, noise = data[0, 0], torch.from_numpy(np.array(data.source.image(0))).permute(2, 0, 1)
    y0, x0, y1, x1 = (sample.boxes[0].double() * torch.tensor([96, 128, 96, 128])).round().long().tolist()
    expected = resized_crop(noise, y0, x0, y1 - y0, x1 - x0, [32, 32], InterpolationMode(name), antialias=True)
    difference = (sample.pixels[0].int() - expected.permute(1, 2, 0)).abs()
    assert difference.max() <= (0 if name == "bicubic" else 1)  # torchvision rounds bilinear ones once more


def test_an_unreadable_file_is_replaced_by_the_next_and_named(gradients):
    (gradients / "2.png").write_bytes(b"broken")
    sample = dataset(gradients)[0, 2]
    (name,) = sample.unreadable
    assert name.startswith("2.png")
    assert sample.pixel[0] == pytest.approx(1 / (96 + 16 * 3))  # image 3 stands in


def test_a_jpeg_whose_header_alone_can_be_read_is_replaced_too(gradients):
    """Crops are drawn once its size is known; those of the image that stands in are drawn anew."""
    other = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8))
    for name in ("2.jpg", "3.jpg"):
        other.resize((90, 120) if name == "2.jpg" else other.size).save(gradients / name)
        (gradients / name).with_suffix(".png").unlink()
    expected = dataset(gradients)[4, 3]
    whole = (gradients / "2.jpg").read_bytes()
    (gradients / "2.jpg").write_bytes(whole[: len(whole) // 2])
    sample = dataset(gradients)[4, 2]
    assert "truncated" in sample.unreadable[0]
    assert torch.equal(sample.pixel, expected.pixel)
    (gradients / "2.jpg").write_bytes((gradients / "3.jpg").read_bytes())
    same = dataset(gradients)[4, 2]  # as if image 3 had stood there from the beginning
    assert all(torch.equal(a, b) for a, b in zip(sample.pixels + sample.boxes, same.pixels + same.boxes, strict=True))


def test_a_large_photograph_is_decoded_no_larger_than_its_crops_need(tmp_path, monkeypatch):
    y, x = np.mgrid[0:800, 0:1200]
    colours = np.stack([(y + 0.5) / 800, (x + 0.5) / 1200, np.zeros((800, 1200))], -1)
    Image.fromarray((255 * colours).round().astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    asked, pixels = [], Picture.pixels
    monkeypatch.setattr(Picture, "pixels", lambda self, shrink=1: asked.append(shrink) or pixels(self, shrink))
    for epoch in range(6):
        sample = dataset(tmp_path)[epoch, 0]
        for view, box in zip(sample.pixels, sample.boxes, strict=True):
            n = view.shape[0] // 8
            means = view.double().view(n, 8, n, 8, 3).mean((1, 3)).reshape(-1, 3) / 255
            expected = token_positions(box[None].double(), (n, n))[0]
            torch.testing.assert_close(means[:, :2], expected, rtol=0, atol=0.02)
    assert set(asked) <= {2, 4, 8}
    assert len(asked) == 6


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
