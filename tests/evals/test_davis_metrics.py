"""J, F and their statistics, against the official evaluation and against plain loops."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from triptych.errors import UserError
from triptych.evals.davis_metrics import boundary, contour, davis_metrics, region, score, statistics


@dataclass
class Annotated:
    """As `triptych.data.davis.Video`, without pictures."""

    name: str
    masks: list

    def __len__(self):
        return len(self.masks)

    def mask(self, i):
        return self.masks[i]


def blobs(seed, frames=6, objects=2, shape=(40, 52)):
    """(frames, H, W) uint8: discs that drift, the later ids in front."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    out = np.zeros((frames, *shape), np.uint8)
    for i in range(1, objects + 1):
        centre, drift, radius = rng.uniform(12, 30, 2), rng.uniform(-1.5, 1.5, 2), rng.uniform(5, 9)
        for t in range(frames):
            cy, cx = centre + t * drift
            out[t][(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = i
    return out


def save(folder, masks):
    folder.mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{i:05d}.png")


def test_j_and_f_are_those_of_the_official_evaluation(golden):
    g = {k: v.numpy() for k, v in golden("davis_metrics").items()}
    j = [region(t, p) for t, p in zip(g["gt"], g["pred"], strict=True)]
    f = [boundary(t, p) for t, p in zip(g["gt"], g["pred"], strict=True)]
    np.testing.assert_allclose(j, g["J"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(f, g["F"], rtol=0, atol=1e-12)
    for ours, name in ((j, "J"), (f, "F")):
        s = statistics(ours)
        np.testing.assert_allclose((s.mean, s.recall, s.decay), g[f"{name}_mean_recall_decay"], rtol=0, atol=1e-12)
    assert (contour(g["gt"][0]) == g["boundary_map_gt0"]).all()


def test_void_pixels_count_as_in_the_official_evaluation(golden):
    g = {k: v.numpy() for k, v in golden("davis_metrics").items()}
    both = list(zip(g["gt"], g["pred"], g["void"], strict=True))
    np.testing.assert_allclose([region(*x) for x in both], g["J_void"], rtol=0, atol=1e-12)
    np.testing.assert_allclose([boundary(*x) for x in both], g["F_void"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("values", ["", "_nan"])
def test_mean_recall_and_decay_are_those_of_the_official_evaluation(golden, values):
    g = golden("davis_statistics")
    s = statistics(g[f"values{values}"].tolist())
    expected = g[f"mean_recall_decay{values}"]
    np.testing.assert_allclose((s.mean, s.recall, s.decay), expected, rtol=0, atol=1e-12)


def test_f_is_the_measure_of_contours_written_as_loops():
    truth, predicted = blobs(1)[0] == 2, blobs(1)[5] == 2
    reach = math.ceil(0.008 * math.hypot(*truth.shape))

    def line(mask):
        h, w = mask.shape
        found = []
        for y in range(h):
            for x in range(w):
                later = [(min(y + dy, h - 1), min(x + dx, w - 1)) for dy, dx in ((0, 1), (1, 0), (1, 1))]
                if any(mask[y, x] != mask[place] for place in later):
                    found.append((y, x))
        return found

    def share_near(points, others):
        near = [p for p in points if any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= reach**2 for q in others)]
        return len(near) / len(points)

    p, r = share_near(line(predicted), line(truth)), share_near(line(truth), line(predicted))
    assert 0 < p < 1
    assert boundary(truth, predicted) == pytest.approx(2 * p * r / (p + r), abs=1e-12)


def test_empty_masks_are_right_where_nothing_is_there_and_wrong_elsewhere():
    nothing, something = np.zeros((30, 40), bool), blobs(0)[0, :30, :40] == 1
    assert region(nothing, nothing) == boundary(nothing, nothing) == 1
    for pair in ((nothing, something), (something, nothing)):
        assert region(*pair) == boundary(*pair) == 0


def test_an_object_that_is_nowhere_predicted_counts_as_empty():
    truth = blobs(3)
    halfway = np.where(truth == 1, 1, 0).astype(np.uint8)
    scores = davis_metrics(zip(truth, halfway, strict=True), truth[0])
    assert scores.objects == (1, 2)
    assert [s.mean for s in scores.j] == [100, 0]


def test_void_pixels_of_an_annotation_are_left_out():
    truth = blobs(4, objects=1)
    predicted = truth.copy()
    predicted[:, :10] = 1
    marked = truth.copy()
    marked[:, :10] = 255
    plain = davis_metrics(zip(truth, predicted, strict=True), truth[0])
    void = davis_metrics(zip(marked, predicted, strict=True), marked[0])
    assert plain.j[0].mean < 90
    assert void.objects == (1,)
    assert void.j[0].mean == void.f[0].mean == 100


def test_quarters_are_right_beyond_255_frames():
    """The official evaluation keeps the borders of the quarters in 8 bits, which 256 frames overflow."""
    falling = np.linspace(1, 0, 1001)
    assert statistics(falling).decay == pytest.approx(0.75, abs=1e-3)


def test_first_and_last_annotated_frames_are_left_out_and_objects_weigh_the_same(tmp_path):
    long, short = blobs(5, frames=8, objects=1), blobs(6, frames=4, objects=2)
    predicted = [np.roll(x, 2, axis=2) for x in (long, short)]
    for masks in predicted:  # what is left out may be anything
        masks[0] = masks[-1] = 9
    videos = [Annotated("long", list(long)), Annotated("short", list(short)), Annotated("bare", [long[0], None])]
    for video, masks in zip(videos, predicted, strict=False):
        save(tmp_path / video.name, masks)
    s = score(tmp_path, videos)
    js = []
    for masks, found, i in ((long, predicted[0], 1), (short, predicted[1], 1), (short, predicted[1], 2)):
        js.append(np.mean([region(t == i, p == i) for t, p in list(zip(masks, found, strict=True))[1:-1]]))
    assert s.j.mean == pytest.approx(100 * np.mean(js))
    assert (s.objects, s.frames, s.left_out) == (3, 8, ("bare",))
    assert s.jf == pytest.approx((s.j.mean + s.f.mean) / 2)


def test_frames_without_annotation_are_skipped(tmp_path):
    masks = blobs(7, frames=9, objects=1)
    save(tmp_path / "all", masks)
    sparse = [m if i % 2 == 0 else None for i, m in enumerate(masks)]
    s = score(tmp_path, [Annotated("all", sparse)])
    assert s.frames == 3  # 2, 4 and 6: 0 was given, 8 is the last
    assert s.j.mean == s.f.mean == 100


def test_the_floor_is_the_first_mask_copied(tmp_path):
    masks = blobs(8, objects=1)
    save(tmp_path / "still", [masks[0]] * len(masks))
    s = score(tmp_path, [Annotated("still", list(masks))])
    assert s.j.mean == pytest.approx(s.floor_j)
    assert s.floor_j < 100


def test_nothing_to_measure_on_gives_no_score(tmp_path):
    assert score(tmp_path, [Annotated("bare", [blobs(0)[0], None, None])]) is None


def test_what_cannot_be_scored_is_told(tmp_path):
    masks = blobs(9)
    video = [Annotated("a", list(masks))]
    with pytest.raises(UserError, match="not there"):
        score(tmp_path, video)
    save(tmp_path / "a", masks[:, :-1])
    with pytest.raises(UserError, match="pixels"):
        score(tmp_path, video)
    Image.fromarray(np.zeros((40, 52, 3), np.uint8)).save(tmp_path / "a" / "00001.png")
    with pytest.raises(UserError, match="RGB"):
        score(tmp_path, video)
