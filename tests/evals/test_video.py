"""Label propagation against the authors' numbers, against plain loops, and through files."""

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_encoder, tiny_swin
from triptych.data.annotated import open_videos
from triptych.data.davis import DAVIS_PALETTE
from triptych.data.images import UnreadableImage
from triptych.errors import UserError
from triptych.evals.davis_metrics import score
from triptych.evals.propagation import Settings, _near, first_labels, label_map, net_size, propagate, stretched
from triptych.evals.video import figures, propagate_frames, video
from triptych.tokens import TokenSpec

REAL = Path(__file__).parents[3] / "shared" / "data" / "davis16_dev" / "davis.zip"


@dataclass
class Drawn:
    """As `triptych.data.davis.Video`: a textured square that moves to the right over a still texture."""

    name: str = "square"
    frames: int = 6
    shape: tuple = (32, 56)
    annotated: bool = True
    ids: tuple = (1,)
    palette: list = field(default_factory=lambda: DAVIS_PALETTE)

    def __len__(self):
        return self.frames

    def left(self, i):
        return 4 + 4 * i

    def frame(self, i):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 90, (*self.shape, 3), dtype=np.uint8)
        square = rng.integers(160, 255, (12, 12, 3), dtype=np.uint8)
        for k, _ in enumerate(self.ids):
            pixels[8 + 12 * k : 20 + 12 * k, self.left(i) : self.left(i) + 12] = square - 80 * k
        return pixels

    def mask(self, i):
        mask = np.zeros(self.shape, np.uint8)
        for k, number in enumerate(self.ids):
            mask[8 + 12 * k : 20 + 12 * k, self.left(i) : self.left(i) + 12] = number
        return mask if self.annotated or i == 0 else None


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec(), image=32, patch=4, width=24)


SMALL = Settings(size=32, n_last=3, radius=3, topk=3)


# --- the numbers ---


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_soft_labels_and_masks_are_those_of_dinos_script(golden, case):
    g = golden(f"davis_propagation_{case}")
    h, w = int(g["grid_h"]), int(g["grid_w"])
    settings = Settings(n_last=int(g["n_last"]), radius=int(g["radius"]), topk=int(g["topk"]))
    features = g["features"].transpose(1, 2).unflatten(2, (h, w))
    soft = list(propagate(features, g["first_onehot"], settings))
    torch.testing.assert_close(torch.stack(soft), g["soft"], rtol=0, atol=1e-6)
    pixels = h * int(g["patch"]), w * int(g["patch"])
    masks = torch.stack([label_map(x, pixels) for x in soft])
    assert torch.equal(masks, g["masks"].long())


def test_channels_are_stretched_as_in_dinos_script(golden):
    """But for a constant channel, of which it makes nan, and of nan the winner: here 1."""
    g = golden("davis_minmax_normalise")
    assert g["out"][3].isnan().all()
    torch.testing.assert_close(stretched(g["maps"]), g["out"].nan_to_num(1), rtol=0, atol=1e-7)


def test_the_window_is_that_of_dinos_script(golden):
    g = golden("davis_neighbourhood")
    grid = int(g["h"]), int(g["w"])
    whole = tuple(slice(0, n) for n in grid)
    near = _near(whole, whole, grid, int(g["radius"]), torch.device("cpu"))
    assert torch.equal(near.float(), g["mask"])


def test_sizes_of_frames_and_masks_are_those_of_dinos_script(golden):
    """But for square frames, whose mask the script puts on the grid of a tall frame: 28 x 30 instead of 30 x 28."""
    g = golden("davis_resize")
    for h, w, net_h, net_w, grid_h, grid_w, channels in g["rows"].tolist():
        assert net_size(h, w, 480, 16) == (net_h, net_w)
        mask = np.zeros((h, w), np.uint8)
        mask[:5, :5], mask[h // 2 :, w // 2 :] = 1, 2
        labels, ids = first_labels(mask, (net_h // 16, net_w // 16))
        expected = (channels, grid_h, grid_w) if h != w else (channels, grid_w, grid_h)
        assert (ids[-1] + 1, *labels.shape[1:]) == expected  # an id that got lost has no channel here


def dense_loops(features, first, s):
    """The procedure, one number at a time."""
    unit = [x / x.norm(dim=0) for x in features.double()]
    _, h, w = unit[0].shape
    places = [(y, x) for y in range(h) for x in range(w)]
    labels = [first.double()]
    for t in range(1, len(unit)):
        used = [0, *range(max(1, t - s.n_last), t)]
        out = torch.zeros_like(labels[0])
        for y, x in places:
            affinity = {}
            for f in used:
                for v, u in places:
                    if not s.radius or (abs(v - y) <= s.radius and abs(u - x) <= s.radius):
                        affinity[f, v, u] = float((unit[t][:, y, x] @ unit[f][:, v, u] / s.temperature).exp())
            least = sorted(affinity.values())[-s.topk :][0]
            kept = {place: a for place, a in affinity.items() if a >= least}
            for (f, v, u), a in kept.items():
                out[:, y, x] += a / sum(kept.values()) * labels[f][:, v, u]
        labels.append(out)
    return torch.stack(labels[1:])


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_propagation_is_the_procedure_written_as_loops(radius):
    g = torch.Generator().manual_seed(radius)
    features = torch.randn(5, 6, 3, 5, generator=g, dtype=torch.float64)
    first = torch.nn.functional.one_hot(torch.randint(3, (3, 5), generator=g)).permute(2, 0, 1).double()
    settings = Settings(n_last=2, radius=radius, topk=4)
    soft = torch.stack(list(propagate(features, first, settings)))
    torch.testing.assert_close(soft, dense_loops(features, first, settings), rtol=0, atol=1e-12)
    torch.testing.assert_close(soft.sum(1), torch.ones(4, 3, 5, dtype=torch.float64))


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.bytes = max(self.bytes, out.nbytes)
        return out


def dense(features, first, s):
    """All pairs of tokens at once."""
    _, _, h, w = features.shape
    unit = torch.nn.functional.normalize(features, dim=1).flatten(2)
    y, x = (place.flatten() for place in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    near = ((y[:, None] - y).abs() <= s.radius) & ((x[:, None] - x).abs() <= s.radius) if s.radius else torch.tensor(1)
    labels = [first.flatten(1)]
    for t in range(1, len(unit)):
        used = [0, *range(max(1, t - s.n_last), t)]
        a = torch.cat([(unit[t].T @ unit[f] / s.temperature).exp() * near for f in used], 1)
        a = a * (a >= a.topk(s.topk).values[:, -1:])
        labels.append(torch.cat([labels[f] for f in used], 1) @ (a / a.sum(1, keepdim=True)).T)
    return torch.stack(labels[1:]).unflatten(2, (h, w))


@pytest.mark.parametrize("radius", [0, 6])
def test_tiles_within_a_bound_of_memory_give_what_all_pairs_at_once_give(radius):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 8, 30, 40, generator=g)
    first = torch.rand(2, 30, 40, generator=g)
    settings = Settings(radius=radius)
    expected = dense(features, first, settings)
    for memory in (16, 1):
        with LargestTensor() as largest:
            soft = torch.stack(list(propagate(features, first, settings, memory_mb=memory)))
        assert largest.bytes < memory * 2**20
        torch.testing.assert_close(soft, expected, rtol=0, atol=1e-6)


def test_a_low_temperature_takes_the_nearest_token_instead_of_overflowing():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 8, 4, 5, generator=generator)
    first = torch.eye(20)[:, torch.randperm(20, generator=generator)].unflatten(1, (4, 5))
    cold = list(propagate(features, first, Settings(temperature=1e-9, radius=0, n_last=0)))
    nearest = torch.einsum(
        "dhw,dkl->hwkl", *(torch.nn.functional.normalize(x, dim=0) for x in (features[1], features[0]))
    )
    chosen = nearest.flatten(2).argmax(-1)
    assert torch.equal(cold[0].permute(1, 2, 0), first.flatten(1).T[chosen])


def test_equals_of_the_kth_largest_all_count():
    features = torch.ones(2, 3, 1, 4)  # each token like each other
    first = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 4)
    (soft,) = propagate(features, first, Settings(radius=0, topk=1))
    torch.testing.assert_close(soft, torch.full((1, 1, 4), 0.25))


def test_half_precision_features_are_compared_in_full():
    features = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    first = torch.rand(2, 4, 4)
    half, full = (torch.stack(list(propagate(x, first, Settings()))) for x in (features, features.float()))
    assert torch.equal(half, full)


def test_an_object_that_fills_the_frame_wins_it():
    soft = torch.stack([torch.zeros(2, 3), torch.full((2, 3), 0.7)])
    assert (label_map(soft, (8, 12)) == 1).all()


def test_of_equal_channels_the_first_wins():
    soft = torch.rand(1, 2, 3).expand(3, 2, 3)
    assert not label_map(soft, (8, 12)).any()
    assert not label_map(torch.zeros(3, 2, 3), (8, 12)).any()


def test_ids_come_back_as_they_were_and_void_pixels_have_no_label():
    mask = np.full((8, 8), 200, np.uint8)
    mask[:4], mask[:, 4:] = 0, 255
    labels, ids = first_labels(mask, (4, 4))
    assert ids.tolist() == [0, 200]
    assert torch.equal(labels.sum(0), torch.tensor([1.0, 1, 0, 0]).expand(4, 4))


# --- sizes ---


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 24, 32, 48])
def test_every_frame_becomes_whole_patches(patch):
    frames = [(480, 854), (854, 480), (480, 480), (480, 500), (96, 97), (1080, 4000)]
    for frame, size in itertools.product(frames, (48, 240, 480)):
        rows, columns = net_size(*frame, size, patch)
        assert rows % patch == columns % patch == 0
        assert min(rows, columns) > 0
        assert size - patch < (columns if frame[0] > frame[1] else rows) <= size


def test_a_size_below_a_patch_is_refused():
    with pytest.raises(UserError, match="patch"):
        net_size(480, 854, 8, 16)


@pytest.mark.parametrize("bad", [{"topk": 0}, {"n_last": -1}, {"temperature": 0.0}, {"std": (0.2, 0.0, 0.2)}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        Settings(**bad)


def test_defaults_are_those_of_the_released_script():
    """eval_video_segmentation.py of DINO; .228 is its own slip, in all published numbers."""
    assert Settings() == Settings(480, 7, 12, 5, 0.1, (0.485, 0.456, 0.406), (0.228, 0.224, 0.225))


# --- frames and encoders ---


def test_frames_enter_the_encoder_resized_and_normalised(encoder, monkeypatch):
    entered = []

    def tokens(_, images):
        entered.append(images)
        return torch.rand(1, 5, 8, 16)

    monkeypatch.setattr("triptych.evals.video.patch_map", tokens)
    frames = np.random.default_rng(0).integers(0, 255, (2, 50, 120, 3), dtype=np.uint8)
    mask = np.eye(50, 120, dtype=np.uint8)
    list(propagate_frames(encoder, frames, mask, replace(SMALL, size=35)))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, size=(32, 64), mode="bilinear") / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225)))
    levels = 1.1 / 255 / 0.224  # OpenCV rounds to whole ones
    torch.testing.assert_close(torch.cat(entered), (resized - mean) / std, rtol=0, atol=levels)


def test_a_moving_square_is_followed(encoder, tmp_path):
    result = video(encoder, [Drawn()], SMALL)
    assert result.scores.j.mean > 80
    assert result.scores.floor_j < 40


@pytest.mark.parametrize("shape", [(32, 56), (56, 32), (32, 32)])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_wide_tall_and_square_frames_go_through_vit_and_swin(kind, shape):
    torch.manual_seed(0)
    make = {"vit": tiny_encoder, "swin": tiny_swin}[kind]
    encoder = make(TokenSpec(), image=32)
    pixels = np.random.default_rng(0).integers(0, 255, (3, *shape, 3), dtype=np.uint8)
    mask = np.zeros(shape, np.uint8)
    mask[:16, :16] = 3
    maps = list(propagate_frames(encoder, pixels, mask, SMALL))
    assert len(maps) == 3
    assert maps[0] is mask
    for found in maps:
        assert found.shape == shape
        assert found.dtype == np.uint8
        assert set(np.unique(found)) <= {0, 3}


def test_what_cannot_be_propagated_is_told(encoder):
    frames, mask = [np.zeros((32, 56, 3), np.uint8)] * 2, np.zeros((32, 56), np.uint8)
    with pytest.raises(UserError, match="object"):
        next(propagate_frames(encoder, frames, mask))
    mask[:9] = 1
    with pytest.raises(UserError, match="frame 0"):
        list(propagate_frames(encoder, frames, mask[:-1], SMALL))
    broken = tiny_encoder(TokenSpec(), image=32)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        list(propagate_frames(broken, frames, mask, SMALL))


# --- files ---


def test_masks_lie_in_the_layout_of_davis(encoder, tmp_path):
    source = Drawn(ids=(1, 7))
    result = video(encoder, [source], SMALL, out=tmp_path)
    files = sorted((tmp_path / "square").glob("*.png"))
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(6)]
    with Image.open(files[0]) as first:
        assert first.mode == "P"
        assert first.getpalette() == DAVIS_PALETTE
        assert (np.array(first) == source.mask(0)).all()
    with Image.open(files[-1]) as last:
        assert last.size == (56, 32)
        assert 7 in np.array(last)
    assert result.scores == score(tmp_path, [source])
    assert result.scores.sequences[0].objects == (1, 7)
    assert (result.frames, result.reused, result.folder) == (6, 0, str(tmp_path))


def test_what_is_there_is_not_computed_again(encoder, tmp_path, monkeypatch):
    first = video(encoder, [Drawn()], SMALL, out=tmp_path)
    seen = []
    monkeypatch.setattr("triptych.evals.video._encoded", lambda *_: seen.append(1))
    again = video(encoder, [Drawn()], SMALL, out=tmp_path)
    assert seen == []
    assert again == replace(first, reused=1)


def test_a_stopped_run_goes_on_and_ends_the_same(encoder, tmp_path):
    whole = video(encoder, [Drawn("a"), Drawn("b")], SMALL, out=tmp_path)
    gone = tmp_path / "b" / "00003.png"
    before = gone.read_bytes()
    gone.unlink()
    again = video(encoder, [Drawn("a"), Drawn("b")], SMALL, out=tmp_path)
    assert again == replace(whole, reused=1)
    assert gone.read_bytes() == before


def test_a_folder_of_something_else_is_refused_before_work_starts(encoder, tmp_path):
    video(encoder, [Drawn()], SMALL, out=tmp_path)
    torch.manual_seed(1)
    other = tiny_encoder(TokenSpec(), image=32, patch=4, width=24)
    with pytest.raises(UserError, match="another encoder"):
        video(other, [Drawn("new"), Drawn()], SMALL, out=tmp_path)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="another topk"):
        video(encoder, [Drawn()], replace(SMALL, topk=2), out=tmp_path)
    with pytest.raises(UserError, match="another first mask"):
        video(encoder, [Drawn(ids=(2,))], SMALL, out=tmp_path)
    (tmp_path / "square" / "triptych.json").unlink()
    with pytest.raises(UserError, match="did not write"):
        video(encoder, [Drawn()], SMALL, out=tmp_path)


def test_videos_without_later_annotations_are_written_and_not_scored(encoder, tmp_path):
    result = video(encoder, [Drawn("bare", annotated=False)], SMALL, out=tmp_path)
    assert result.scores is None
    assert figures(result) == []
    assert len(list((tmp_path / "bare").glob("*.png"))) == 6
    both = video(encoder, [Drawn("bare", annotated=False), Drawn()], SMALL, out=tmp_path)
    assert both.scores.left_out == ("bare",)
    assert "1 sequences without later annotations" in figures(both)[0].note


def test_videos_without_any_object_are_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="no videos"):
        video(encoder, [], SMALL)
    with pytest.raises(UserError, match="object"):
        video(encoder, [Drawn(), Drawn("empty", ids=())], SMALL, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_frame_that_cannot_be_read_is_told(encoder, tmp_path):
    class Damaged(Drawn):
        def frame(self, i):
            if i == 2:
                raise UnreadableImage("square/00002.jpg", "truncated")
            return super().frame(i)

    with pytest.raises(UserError, match=r"00002\.jpg"):
        video(encoder, [Damaged()], SMALL, out=tmp_path)
    assert video(encoder, [Drawn()], SMALL, out=tmp_path).reused == 0


def test_an_output_that_is_a_file_is_refused(encoder, tmp_path):
    file = tmp_path / "masks"
    file.touch()
    with pytest.raises(UserError, match="folder"):
        video(encoder, [Drawn()], SMALL, out=file)


def test_results_can_be_written_as_json(encoder):
    from dataclasses import asdict

    result = video(encoder, [Drawn()], SMALL)
    assert json.loads(json.dumps(asdict(result)))["scores"]["jf"] == result.scores.jf
    assert result.folder is None


# --- photographs ---


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not on this machine")
def test_copying_the_first_mask_scores_what_the_card_of_davis16_dev_says(tmp_path):
    """J = 30 on libby."""
    (libby,) = (v for v in open_videos(REAL) if v.name == "libby")
    (tmp_path / "libby").mkdir()
    for i in range(len(libby)):
        Image.fromarray(libby.mask(0)).save(tmp_path / "libby" / f"{i:05d}.png", compress_level=1)
    scores = score(tmp_path, [libby])
    assert round(scores.j.mean) == 30
    assert scores.floor_j == pytest.approx(scores.j.mean)
