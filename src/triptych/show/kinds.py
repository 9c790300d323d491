"""From maps to tiles: what each kind of picture shows of one image or frame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.methods.udi import SRS
from triptych.show.attention import attention_maps, check_attends, mass_masks, srs_map_of
from triptych.show.colours import ORDER, three
from triptych.show.inputs import Picture, Place
from triptych.show.patches import PCA, Clusters, similarity
from triptych.show.sheet import Panel, Scale, Tile
from triptych.show.tiles import classes_tile, enlarged, heat_tile, marked, mask_tile

Sample = Callable[[], Sequence[Picture]]
"""Images or frames of which something common is found; read when it is called."""


@dataclass(frozen=True)
class Viewer:
    """An encoder, and how its images are normalised.  It stays on its device, in eval mode."""

    encoder: Encoder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def images(self, picture: Picture) -> Tensor:
        """(1, 3, H, W)"""
        like = next(self.encoder.parameters())
        mean, std = (like.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        x = torch.from_numpy(picture.pixels).to(like.device).permute(2, 0, 1).to(like.dtype) / 255
        return ((x - mean) / std)[None]

    def grid(self, picture: Picture) -> tuple[int, int]:
        return self.encoder.grid(*picture.pixels.shape[:2])

    def patches(self, picture: Picture) -> Tensor:
        """(N, D)"""
        return self.encoder(self.images(picture)).patch[0]


@dataclass(frozen=True)
class Kind:
    """How one image is shown, and what is said below all of them."""

    panels: Callable[[Picture], list[Panel]]
    about: str
    scale: Scale | None = None


def attention(viewer: Viewer) -> Kind:
    """A panel for the class token, and one for class+."""
    check_attends(viewer.encoder)

    def panels(picture: Picture) -> list[Panel]:
        maps = attention_maps(viewer.encoder, viewer.images(picture))
        return [
            Panel(_of_token(picture, name, maps), [_photo(picture), *_heads(of[0], picture)])
            for name, of in maps.items()
        ]

    about = "Attention to the patches in the last block; each map from 0 to its own maximum."
    return Kind(panels, about, Scale("0", "maximum"))


def mass(viewer: Viewer, share: float = 0.6) -> Kind:
    """As `attention`, the patches that hold most of it."""
    check_attends(viewer.encoder)
    mass_masks(torch.ones(1, 1), share)  # refuses a wrong share now

    def panels(picture: Picture) -> list[Panel]:
        maps = attention_maps(viewer.encoder, viewer.images(picture))
        out = []
        for name, of in maps.items():
            masks = mass_masks(_with_mean(of[0]), share).cpu().numpy()
            tiles = [
                Tile(title, mask_tile(picture.pixels, m)) for title, m in zip(_titles(len(masks)), masks, strict=True)
            ]
            out.append(Panel(_of_token(picture, name, maps), [_photo(picture), *tiles]))
        return out

    about = f"Orange: the fewest patches that hold {100 * share:g} % of the attention to patches in the last block."
    return Kind(panels, about)


def srs(viewer: Viewer, module: SRS, place: Place) -> Kind:
    """The patches that UDI's sampling mixes into a queried one."""

    def panels(picture: Picture) -> list[Panel]:
        grid = viewer.grid(picture)
        at = place.patch(picture, grid)
        maps = srs_map_of(module, viewer.encoder, viewer.images(picture), at)[0]
        query = Tile("image", marked(picture.pixels, at, grid))
        return [Panel(picture.name, [query, *_heads(maps, picture)])]

    about = "Attention of the queried patch (ring) in UDI's sampling (SRS); each map from 0 to its own maximum."
    return Kind(panels, about, Scale("0", "maximum"))


def pca(viewer: Viewer, sample: Sample, *, each: bool = False) -> Kind:
    """each: components of every image alone, instead of shared ones."""
    shared = None if each else PCA.of(torch.cat([viewer.patches(p) for p in sample()]))

    def panels(picture: Picture) -> list[Panel]:
        tokens = viewer.patches(picture)
        values = (shared or PCA.of(tokens))(tokens).cpu().numpy().reshape(*viewer.grid(picture), 3)
        tile = Tile("PCA of patches", enlarged(three(values), picture.pixels.shape[:2]), smooth=False)
        return [Panel(picture.name, [_photo(picture), tile])]

    whose = "of each image alone" if each else "shared, so equal colours mean similar patches"
    about = f"Principal components, {whose}: the first is lightness, the second blue to yellow, the third green to red."
    return Kind(panels, about)


def clusters(
    viewer: Viewer,
    sample: Sample | None = None,
    *,
    k: int = 3,
    normalise: bool = True,
    restarts: int = 10,
    seed: int = 0,
) -> Kind:
    """k-means of each image's patches or, with a sample, with centres of that (for the frames of a video)."""
    if not 1 <= k <= len(ORDER):
        raise UserError(f"--k {k}: give 1 to {len(ORDER)} clusters, as many as there are colours to tell apart")
    if restarts < 1:
        raise UserError(f"--restarts {restarts}: give 1 or more")

    def found(tokens: Tensor) -> Clusters:
        return Clusters.of(tokens, k, normalise=normalise, restarts=restarts, seed=seed)

    shared = found(torch.cat([viewer.patches(p) for p in sample()])) if sample else None

    def panels(picture: Picture) -> list[Panel]:
        tokens = viewer.patches(picture)
        classes = (shared or found(tokens))(tokens).reshape(viewer.grid(picture))
        return [Panel(picture.name, [_photo(picture), Tile(f"{k} clusters", classes_tile(picture.pixels, classes))])]

    whose = "with the same centres in every frame" if sample else "of each image alone; the largest is blue"
    return Kind(panels, f"k-means of the patches, k = {k}, {whose}.")


def click(viewer: Viewer, place: Place, threshold: float = 0.3, *, first: bool = False) -> Kind:
    """Similarity to the patch that is pointed at, and what is above a threshold.

    first: that of the first picture, for all of them (for the frames of a video).
    """
    asked: list[Tensor] = []  # the first picture's patch

    def panels(picture: Picture) -> list[Panel]:
        grid, patch = viewer.grid(picture), viewer.patches(picture)
        image = picture.pixels
        if not (first and asked):
            at = place.patch(picture, grid)
            image = marked(image, at, grid)
            asked[:] = [patch[at[0] * grid[1] + at[1]]]
        values = similarity(patch, asked[0]).float().cpu().numpy().reshape(grid)
        tiles = [
            Tile("image", image),
            Tile("cosine", heat_tile(values, picture.pixels.shape[:2]), smooth=False),
            Tile(f"above {threshold:g}", mask_tile(picture.pixels, values > threshold)),
        ]
        return [Panel(picture.name, tiles)]

    whose = "the one that was clicked (ring)" if not first else "the one that was clicked (ring in the first frame)"
    return Kind(panels, f"Cosine of every patch with {whose}.", Scale("0 or less", "1"))


def _photo(picture: Picture) -> Tile:
    return Tile("image", picture.pixels)


def _of_token(picture: Picture, name: str, maps: dict) -> str:
    return picture.name if len(maps) == 1 else f"{name} token: {picture.name}"


def _titles(count: int) -> list[str]:
    return ["mean of heads", *(f"head {i}" for i in range(1, count))] if count > 1 else ["one head"]


def _with_mean(maps: Tensor) -> Tensor:
    """(heads, rows, columns) -> their mean before them; one head alone is its own mean."""
    return torch.cat([maps.mean(0, keepdim=True), maps]) if len(maps) > 1 else maps


def _heads(maps: Tensor, picture: Picture) -> list[Tile]:
    """(heads, rows, columns) >= 0, each shown from 0 to its own maximum, their mean first."""
    maps = _with_mean(maps.float())
    shown: np.ndarray = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()
    return [
        Tile(title, heat_tile(x, picture.pixels.shape[:2]), smooth=False)
        for title, x in zip(_titles(len(shown)), shown, strict=True)
    ]
