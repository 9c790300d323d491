"""Logits of whole images, window by window, and the class maps that come of them."""

import pytest
import torch
import torch.nn.functional as F

from triptych.dense import slide as module
from triptych.dense.slide import class_map, slide, windows


def rowwise(kernel):
    """The golden file's network: a convolution, plus a ramp that tells where in its window a pixel is."""

    def logits(images):
        ramp = 0.01 * torch.arange(images.shape[-2], dtype=images.dtype)[:, None]
        return F.conv2d(images, kernel, padding=1) + ramp

    return logits


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
@pytest.mark.parametrize("batch", [1, 4])
def test_window_logits_are_mmsegmentations(golden, case, batch):
    g = golden("seg_slide")
    image, crop, stride = g[f"{case}_image"], int(g[f"{case}_crop"]), int(g[f"{case}_stride"])
    assert len(windows(*image.shape[-2:], crop, stride)) == int(g[f"{case}_num_windows"])
    found = slide(rowwise(g["kernel"]), image, crop, stride, batch=batch)
    torch.testing.assert_close(found, g[f"{case}_logits"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 50), (16, 16), (40, 33), (17, 31)])
def test_windows_cover_every_pixel_and_stay_inside(size):
    covered = torch.zeros(size)
    for top, left in windows(*size, 16, 11):
        assert 0 <= top <= max(0, size[0] - 16)
        assert 0 <= left <= max(0, size[1] - 16)
        covered[top : top + 16, left : left + 16] += 1
    assert covered.min() >= 1


def test_the_images_of_a_batch_do_not_mix():
    images = torch.randn(3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    logits = rowwise(torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
    alone = torch.cat([slide(logits, image[None], 16, 11) for image in images])
    torch.testing.assert_close(slide(logits, images, 16, 11, batch=6), alone)


def test_the_classes_of_an_image_are_those_of_its_upsampled_logits(monkeypatch):
    logits = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.interpolate(logits[None], (40, 33), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(class_map([logits], 40, 33), expected)
    monkeypatch.setattr(module, "BAND", 5 * 33 * 7)  # seven rows at a time
    assert torch.equal(class_map([logits], 40, 33), expected)


def test_several_scales_vote_with_their_probabilities():
    generator = torch.Generator().manual_seed(0)
    maps = [3 * torch.randn(4, *size, generator=generator) for size in ((5, 5), (8, 8), (10, 10))]
    upsampled = [F.interpolate(x[None], (20, 20), mode="bilinear", align_corners=False)[0] for x in maps]
    expected = torch.stack([x.softmax(0) for x in upsampled]).mean(0).argmax(0)
    found = class_map(maps, 20, 20)
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.stack(upsampled).mean(0).argmax(0))  # which is another vote
