"""`triptych show`: one command per kind of picture.  Nothing heavy is imported before a command needs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter, validators

from triptych.cli_eval import Count, Model, Pixels, Seed, Weights

if TYPE_CHECKING:
    from triptych.run_show import Asked

pictures = App(name="show", help="Draw what an encoder sees: of images one PNG, of a video an MP4.")

INPUTS = Parameter(help="Image files; or one folder, archive or data set; or one video.", negative="")
Inputs = Annotated[str, INPUTS]
At = Annotated[str, Parameter(help="X,Y of the patch: pixels (120,80) or shares of width and height (0.5,0.25).")]
Rate = Annotated[float | None, Parameter(validator=validators.Number(gt=0))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Shown(Weights):
    """What every kind of picture takes.

    Parameters
    ----------
    out
        File of the picture (.png, .jpg, .webp) or, of a video, .mp4.  A picture of a video shows 8 of its frames.
        Default: KIND.png, of a video KIND.mp4.
    images
        Of a folder, archive or data set show so many images.
    seed
        Of their choice, and of k-means.
    """

    out: Path | None = None
    images: Count = 16
    seed: Seed = 0

    def asked(self, kind: str, inputs: tuple[str, ...], **more) -> "Asked":
        from triptych.run_show import Asked, default_out

        file = {name: getattr(self, name) for name in ("arch", "heads", "origin", "partial")}
        fallback = default_out(kind, inputs, more.get("fps"))
        out = self.out or fallback
        return Asked(inputs, out, images=self.images, seed=self.seed, weights=self.weights, file=file, **more)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Maps(Shown):
    """What kinds take that show maps of patches.

    Parameters
    ----------
    size
        Pixels of an image's longer side; both sides are rounded to whole patches.
    square
        Resize to size x size, as in the papers' figures, instead of keeping the image's shape.
    fps
        Read a folder's images, in their order, as the frames of a video at so many a second; of a video file, change
        its rate.  A folder with --out FILE.mp4 has 24.
    """

    size: Pixels = 480
    square: Annotated[bool, Parameter(negative="")] = False
    fps: Rate = None

    def draw(self, kind: str, model: str, inputs: tuple[str, ...], **options) -> None:
        from triptych import run_show

        asked = self.asked(kind, inputs, size=self.size, square=self.square, fps=self.fps)
        run_show.maps(kind, model, asked, **options)


MAPS, STILLS = Maps(), Shown()


@pictures.command
def attention(model: Model, *inputs: Inputs, options: Maps = MAPS) -> None:
    """What class and class+ attend to in the last block: the mean over heads, and every head."""
    options.draw("attention", model, inputs)


@pictures.command
def mass(model: Model, *inputs: Inputs, share: float = 0.6, options: Maps = MAPS) -> None:
    """The fewest patches that hold a share of the attention of class and class+, for the mean and every head.

    Parameters
    ----------
    share
        Of the attention to patches, above 0 and at most 1.
    """
    options.draw("mass", model, inputs, share=share)


@pictures.command
def srs(run: Model, *inputs: Inputs, at: At = "0.5,0.5", options: Maps = MAPS) -> None:
    """Of a run of UDI: which patches its semantic sampling (SRS) mixes into a queried one."""
    options.draw("srs", run, inputs, at=at)


@pictures.command
def pca(
    model: Model, *inputs: Inputs, each: Annotated[bool, Parameter(negative="")] = False, options: Maps = MAPS
) -> None:
    """The first three principal components of patch tokens as colours.

    Parameters
    ----------
    each
        Components of every image (of a video: every frame) alone, instead of shared ones.
    """
    options.draw("pca", model, inputs, each=each)


@pictures.command
def clusters(
    model: Model, *inputs: Inputs, k: Count = 3, restarts: Count = 10, normalise: bool = True, options: Maps = MAPS
) -> None:
    """k-means of each image's patches (of a video: with centres that all frames share).

    Parameters
    ----------
    k
        Number of clusters, at most 8.
    restarts
        Of k-means++; the best one counts.
    normalise
        Tokens of unit length.
    """
    options.draw("clusters", model, inputs, k=k, restarts=restarts, normalise=normalise, seed=options.seed)


@pictures.command
def click(model: Model, *inputs: Inputs, at: At = "0.5,0.5", threshold: float = 0.3, options: Maps = MAPS) -> None:
    """Cosine of every patch with the one that is pointed at, and the patches above a threshold.

    Parameters
    ----------
    threshold
        Cosine; MMC's table has 0.1 to 0.4.
    """
    options.draw("click", model, inputs, at=at, threshold=threshold)


@pictures.command
def neighbours(
    model: Model,
    *inputs: Inputs,
    gallery: str,
    k: Count = 8,
    token: str = "cls",
    size: Pixels = None,
    options: Shown = STILLS,
) -> None:
    """The images of a gallery that are most like each input.

    Parameters
    ----------
    gallery
        Images: folder, archive or data set.
    k
        So many of them.
    token
        One of cls, cls_plus, patch_mean, cls+patch_mean, cls_raw, cls+gem, attended_N.
    size
        Pixels of the images.  Default: what the encoder was trained on.
    """
    from triptych import run_show

    run_show.neighbours(model, options.asked("neighbours", inputs, size=size), gallery=gallery, k=k, token=token)


@pictures.command
def correspondence(
    model: Model,
    first: Annotated[str, Parameter(help="Image file.")],
    second: Annotated[str, Parameter(help="Image file.")],
    *,
    top: Count = 30,
    size: Pixels = 480,
    square: Annotated[bool, Parameter(negative="")] = False,
    options: Shown = STILLS,
) -> None:
    """Lines between patches of two images that are each other's most similar one.

    Parameters
    ----------
    top
        At most so many, the most similar ones.
    size
        Pixels of an image's longer side; both sides are rounded to whole patches.
    square
        Resize to size x size instead of keeping the image's shape.
    """
    from triptych import run_show

    asked = options.asked("correspondence", (first, second), size=size, square=square)
    run_show.correspondence(model, asked, top=top)


@pictures.command
def reconstruction(
    run: Model,
    *inputs: Inputs,
    blocks: Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")] = None,
    norm: bool = True,
    images: Count = 4,
    seed: Seed = 0,
    out: Path = Path("reconstruction.png"),
) -> None:
    """What the pixel head of MMC, SiT, GMML or MC-SSL makes of the student's patches after each block.

    Parameters
    ----------
    blocks
        Counted from 1.  Default: the upper half.
    norm
        The patches pass the encoder's final norm before the head.
    images
        Of a folder, archive or data set show so many images.
    seed
        Of their choice, and of their corruption.
    out
        File of the picture.
    """
    from triptych import run_show

    asked = Shown(out=out, images=images, seed=seed).asked("reconstruction", inputs)
    run_show.reconstruction(run, asked, blocks=blocks or (), norm=norm)
