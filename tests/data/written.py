"""Data sets that tests write: {path: array, image, text or bytes}, into a folder or a zip file."""

import io
import zipfile

import numpy as np
from PIL import Image


def encoded(content, name):
    """Arrays as images of their name's format, text as UTF-8, bytes as they are."""
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, "JPEG" if name.endswith(".jpg") else "PNG")
        return file.getvalue()
    return content.encode() if isinstance(content, str) else content


def in_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(content, name))
    return path


def in_zip(path, files, inside=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(inside + name, encoded(content, name))
    return path
