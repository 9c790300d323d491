"""`triptych eval` of patch tokens: on images with masks or boxes, and on videos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from triptych.cli_eval import Count, Model, Pixels, Seed, Weights, evaluate

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Dense(Weights):
    """What protocols on patch tokens take.

    Parameters
    ----------
    data
        Images with masks or boxes: a path or KIND[:SPLIT]@PATH, of camvid, voc, ade20k, cityscapes, masks, coco, davis;
        see docs/annotated_data.md.
    seed
        Of everything that is drawn.
    out
        File that results are appended to as JSON lines.
    """

    data: str
    seed: Seed = 0
    out: Path = Path("results.jsonl")

    def weights_of(self) -> dict:
        """As of `load_encoder`."""
        return {name: getattr(self, name) for name in ("weights", "arch", "heads", "origin", "partial")}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Trained(Dense):
    """What protocols take that train a network on the encoder.

    Parameters
    ----------
    test
        What to measure on.  Default: the data's own held-out part.
    run
        Folder of the training, which the same command goes on with.  Default: runs/PRESET-MODEL-DATA-SEED.
    """

    test: str | None = None
    run: Path | None = None

    def training(self) -> dict:
        return {"run": self.run, "seed": self.seed, "weights": self.weights_of()}


@evaluate.command(name="click")
def eval_click(
    model: Model,
    *,
    size: Count = 480,
    thresholds: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative="")] = (0.1, 0.2, 0.3, 0.4),
    unit: Literal["category", "instance", "largest", "component"] = "category",
    prompt: Literal["random", "max_coverage", "centroid", "mean"] = "random",
    averaging: Literal["targets", "classes", "dataset", "dataset_classes"] = "targets",
    resolution: Literal["size", "patches", "original"] = "size",
    similarity: Literal["cosine", "minmax", "shifted"] = "cosine",
    connected: Literal["none", "4", "8"] = "none",
    images: Count | None = None,
    options: Dense,
) -> None:
    """Zero-shot segmentation from one clicked patch (MMC): what is more similar to it than a threshold?

    Defaults are the reading of docs/protocols/click.md; the paper leaves open what the other options choose.

    Parameters
    ----------
    size
        Pixels of the square that images become.
    thresholds
        Of the similarity; the best one is told apart.
    unit
        What is sought: a category in the image, an instance, the largest instance, a connected part.
    prompt
        The clicked patch, of those at least half in the target: random, of largest coverage, nearest to the centroid;
        or the mean over all of them.
    averaging
        Mean over targets, over classes of those, sums of intersections over sums of unions, that by class.
    resolution
        Where IoU is measured: pixels at `size`, patches, pixels of the original image.
    similarity
        The raw cosine s, each map stretched to 0..1, or (1 + s) / 2.
    connected
        Keep only what is connected (4 or 8 neighbours) with the clicked patch.
    images
        At most so many, drawn by the seed.  Default: all.
    """
    from triptych import run_dense

    settings = {"size": size, "thresholds": thresholds, "unit": unit, "prompt": prompt, "averaging": averaging}
    settings |= {"resolution": resolution, "similarity": similarity, "connected": connected}
    chosen = {"images": images, "seed": options.seed, "subject": options.weights_of()}
    run_dense.eval_click(model, options.data, options.out, **chosen, **settings)


@evaluate.command(name="target-area")
def eval_target_area(
    *, data: str, size: Count = 480, patch_size: Count = 16, images: Count | None = None, seed: Seed = 0
) -> None:
    """How much of an image the targets of `eval click` cover: the floor of each reading, without any encoder.

    Parameters
    ----------
    data
        Images with masks, as of `eval click`.
    size
        Pixels of the square that images become.
    patch_size
        Pixels of a patch.
    images
        At most so many, drawn by the seed.  Default: all.
    """
    from triptych import run_dense

    run_dense.target_area(data, size=size, patch_size=patch_size, images=images, seed=seed)


@evaluate.command(name="similarity")
def eval_similarity(
    model: Model,
    *,
    size: Count = 480,
    objects: Literal["category", "instance"] = "category",
    pairs: Literal["image", "dataset"] = "image",
    per_image: Count = 1000,
    background: Annotated[bool, Parameter(negative="")] = False,
    images: Count | None = None,
    options: Dense,
) -> None:
    """How alike patches of one object are, and of different ones: means and overlap of the two distributions (MMC).

    Parameters
    ----------
    size
        Pixels of the square that images become.
    objects
        What one object is: all instances of a category in the image, or an instance.
    pairs
        Both patches of one image, or of two images of the set.
    per_image
        Pairs of either kind that are drawn of each image.
    background
        Patches outside all objects count as different from them; needed where images have one object (DAVIS-2016).
    images
        At most so many, drawn by the seed.  Default: all.
    """
    from triptych import run_dense

    settings = {"size": size, "objects": objects, "pairs": pairs, "per_image": per_image, "background": background}
    settings |= {"images": images, "seed": options.seed, "subject": options.weights_of()}
    run_dense.eval_similarity(model, options.data, options.out, **settings)


@evaluate.command(name="video")
def eval_video(
    model: Model,
    *,
    size: Count = 480,
    n_last: int = 7,
    radius: int = 12,
    topk: Count = 5,
    temperature: float = 0.1,
    masks: Path | None = None,
    options: Dense,
) -> None:
    """Follow the objects of a video's first mask by the similarity of patches: J and F on DAVIS.

    Parameters
    ----------
    size
        Pixels of the shorter side.
    n_last
        Frames before the present one that labels come from, beside the first.
    radius
        Patches around the same place that labels come from; 0 = the whole frame.
    topk
        Patches whose labels are averaged.
    temperature
        Of their weights exp(cosine / T).
    masks
        Folder for the masks of every frame, in DAVIS's own layout; videos that are there already are not done again.
    """
    from triptych import run_dense

    settings = {"size": size, "n_last": n_last, "radius": radius, "topk": topk, "temperature": temperature}
    run_dense.eval_video(model, options.data, options.out, subject=options.weights_of(), masks=masks, **settings)


@evaluate.command(name="probe")
def eval_probe(
    model: Model,
    *,
    test: str | None = None,
    size: Pixels = None,
    images: Count = 1000,
    per_image: Count = 64,
    options: Dense,
) -> None:
    """A quick linear probe on frozen patch tokens of images with masks: mIoU in about a minute.

    Parameters
    ----------
    test
        What to measure on.  Default: the data's own held-out part.
    size
        Pixels of the shorter side.  Default: what the encoder was trained on, but at least 24 patches.
    images
        Training images, at most, drawn by the seed.
    per_image
        Patches of each training image that are learned from.
    """
    from triptych import run_dense

    settings = {
        "size": size,
        "images": images,
        "per_image": per_image,
        "seed": options.seed,
        "subject": options.weights_of(),
    }
    run_dense.eval_patch_probe(model, options.data, test, options.out, **settings)


@evaluate.command(name="segmentation")
def eval_segmentation(model: Model, *overrides: Overrides, preset: str = "linear_small", options: Trained) -> None:
    """Train a network of semantic segmentation on the encoder, frozen or tuned, and measure mIoU.

    The same command goes on with what was stopped.  Other settings of the preset: `--steps 50 --warmup 5`; all of them
    are listed in docs/protocols/segmentation.md.

    Parameters
    ----------
    preset
        linear_small, upernet_small, fpn_small (minutes to hours on a CPU); mmc, ibot (linear, frozen), upernet_mte,
        upernet_ibot, fpn_udi (the papers').
    """
    from triptych import run_dense

    given = {"preset": preset, "overrides": list(overrides), **options.training()}
    run_dense.eval_segmentation(model, options.data, options.test, options.out, **given)


@evaluate.command(name="detection")
def eval_detection(model: Model, *overrides: Overrides, preset: str = "mask_rcnn_small", options: Trained) -> None:
    """Train a detector on the encoder, with masks where the data has them, and measure COCO's AP.

    The same command goes on with what was stopped.  Other settings of the preset: `--steps 50 --warmup 5`; all of them
    are listed in docs/protocols/detection.md.

    Parameters
    ----------
    preset
        mask_rcnn_small, cascade_small (for a CPU); mask_rcnn_udi, cascade_ibot_s, cascade_ibot_b, cascade_mte_s,
        cascade_mte_b (the papers').
    """
    from triptych import run_dense

    given = {"preset": preset, "overrides": list(overrides), **options.training()}
    run_dense.eval_detection(model, options.data, options.test, options.out, **given)
