"""The images of a store as a source, with labels if they have some."""

from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from triptych.data.images import UnreadableImage
from triptych.data.stores import Store
from triptych.data.subsets import digest


class Stored:
    """The images of a store at `positions`; labels go with the positions' order, None = no image has one."""

    def __init__(
        self,
        name: str,
        store: Store,
        positions: Sequence[int],
        labels: Sequence[int | None] | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        self.name, self.classes = name, classes
        self.open_store, self._positions, self._labels = store, positions, labels
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._positions)

    def image(self, index: int) -> Image.Image:
        position = self._positions[index]
        try:
            image = self.open_store.image(position)
            image.load()
        except Exception as error:  # of any kind: each of Pillow's decoders raises its own
            raise UnreadableImage(self.key(index), reason(error)) from error
        return image

    def header(self, index: int) -> Image.Image:
        """The image, opened but not decoded where its store can do so; raises UnreadableImage."""
        try:
            return self.open_store.image(self._positions[index])
        except Exception as error:  # of any kind, as above
            raise UnreadableImage(self.key(index), reason(error)) from error

    def stored(self, index: int) -> bytes | None:
        try:
            return self.open_store.encoded(self._positions[index])
        except Exception as error:  # of any kind, as above
            raise UnreadableImage(self.key(index), reason(error)) from error

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels else None

    def key(self, index: int) -> str:
        return self.open_store.keys[self._positions[index]]

    def fingerprint(self) -> str:
        if self._fingerprint is None:  # once: it asks for the size of every file
            sizes = (self.open_store.size(position) for position in self._positions)
            self._fingerprint = digest(f"{self.key(i)}\0{self.label(i)}\0{size}" for i, size in enumerate(sizes))
        return self._fingerprint


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # its own text names a buffer in memory
        return "not an image, or of a format that Pillow cannot read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
