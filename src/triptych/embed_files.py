"""The files that `embed` writes: features as they come, then NumPy, Parquet or CSV files made of them in pieces."""

import csv
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from triptych.data.sources import Source
from triptych.errors import UserError
from triptych.evals.selection import Token

FORMATS = (".npy", ".parquet", ".csv")
HEADER = 128  # bytes of an .npy file before its numbers, whatever their count
ROW_GROUP = 4096  # rows of Parquet that are in memory at a time
SAVE_EVERY = 5.0  # seconds: a killed process loses at most so much, and the batch in hand
COLUMNS = ("index", "file", "label", "class")  # position in the source, path in it, class number and name


def check_out(out: Path) -> None:
    """Raises UserError for a name without a known ending, a folder, and Parquet without its package."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: its ending says what is written: name a file {', '.join(FORMATS)}")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError("Parquet files need the package pyarrow: pip install 'triptych[parquet]'")


def outputs(out: Path, tokens: Sequence[Token]) -> list[Path]:
    """The files that come into being."""
    if out.suffix != ".npy":
        return [out]
    several = [out.with_name(f"{out.stem}.{token}.npy") for token in tokens] if len(tokens) > 1 else [out]
    return [*several, out.with_name(f"{out.stem}.rows.csv")]


class Kept:
    """Features on their way: one .npy file per token in a folder, whose header is written again when rows are added."""

    def __init__(self, folder: Path, tokens: Sequence[Token], dtype: str) -> None:
        """Opened, or made."""
        self.tokens, self._dtype, self._saved = list(tokens), np.dtype(dtype).newbyteorder("<"), time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[Token, BinaryIO] = {}
        for token in tokens:
            path = _kept(folder, token)
            path.touch()
            self._files[token] = path.open("r+b")
        self._width: dict[Token, int] = {}

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def holds(self, rows: int, width: Mapping[Token, int]) -> bool:
        """Are so many rows there?  If so, further ones follow them."""
        self._width = dict(width)
        sizes = {token: os.fstat(file.fileno()).st_size for token, file in self._files.items()}
        return all(size >= self._place(token, rows) for token, size in sizes.items()) if rows else True

    def put(self, row: int, features: Mapping[Token, Tensor], what: str) -> None:
        """(B, D) of each token, from this row on.  Raises UserError for numbers that are not finite."""
        for token, x in features.items():
            with np.errstate(over="ignore"):  # told below
                values = x.float().cpu().numpy().astype(self._dtype)
            if not np.isfinite(values).all():
                reason = "do not fit into float16: leave out --half" if x.isfinite().all() else "are NaN or infinite"
                raise UserError(f"features ({token}) of {what} {reason}")
            self._width[token] = x.shape[1]
            self._files[token].seek(self._place(token, row))
            self._files[token].write(values.tobytes())

    def due(self) -> bool:
        return time.monotonic() - self._saved > SAVE_EVERY

    def save(self, rows: int, *, whole: bool = False) -> None:
        """So many rows are on the disk when this returns; whole: and nothing else."""
        for token, file in self._files.items():
            if rows:
                file.seek(0)
                file.write(_header((rows, self._width[token]), self._dtype))
            if whole:
                file.truncate(self._place(token, rows))
            file.flush()
            os.fsync(file.fileno())
        self._saved = time.monotonic()

    def _place(self, token: Token, row: int) -> int:
        return HEADER + row * self._width.get(token, 0) * self._dtype.itemsize


def _kept(folder: Path, token: Token) -> Path:
    return folder / f"{token}.npy"


def _header(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """Of an .npy file of format 1.0; NumPy's own is not of one length in all its versions."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    return np.lib.format.magic(1, 0) + struct.pack("<H", HEADER - 10) + text.ljust(HEADER - 11).encode() + b"\n"


def write(out: Path, folder: Path, source: Source, unreadable: Sequence[int], tokens: Sequence[Token]) -> None:
    """The files that `outputs` names, of the features that are kept in a folder; none comes into being half."""
    rows, part = _rows(source, set(unreadable)), folder / "part"
    if out.suffix == ".npy":
        *arrays, names = outputs(out, tokens)
        _write_csv(part, rows, {})
        part.replace(names)
        for token, path in zip(tokens, arrays, strict=True):
            _kept(folder, token).replace(path)
        return
    features = {token: np.load(_kept(folder, token), mmap_mode="r") for token in tokens}
    (_write_csv if out.suffix == ".csv" else _write_parquet)(part, rows, features)
    part.replace(out)


def _rows(source: Source, left_out: set[int]) -> Iterator[tuple[int, str, int | None, str | None]]:
    """COLUMNS of every image that has features."""
    for index in range(len(source)):
        if index not in left_out:
            label = source.label(index)
            yield index, source.key(index), label, None if label is None else (source.classes or ())[label]


def _write_csv(out: Path, rows: Iterator[tuple], features: Mapping[Token, np.ndarray]) -> None:
    """UTF-8 with a head line; numbers in the fewest digits that give them back."""
    with out.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*COLUMNS, *(f"{token}_{i}" for token, x in features.items() for i in range(x.shape[1]))])
        for i, row in enumerate(rows):
            lines.writerow([*row, *(number for x in features.values() for number in x[i].astype(str).tolist())])


def _write_parquet(out: Path, rows: Iterator[tuple], features: Mapping[Token, np.ndarray]) -> None:
    import pyarrow as pa  # pyright: ignore[reportMissingImports] - an extra
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    lists = {token: pa.list_(pa.from_numpy_dtype(x.dtype), x.shape[1]) for token, x in features.items()}
    types: list[Any] = [pa.int64(), pa.string(), pa.int64(), pa.string()]
    schema = pa.schema([*zip(COLUMNS, types, strict=True), *lists.items()])
    with parquet.ParquetWriter(out, schema, use_dictionary=["class"]) as file:  # pyright: ignore[reportArgumentType]
        start = 0
        while piece := list(islice(rows, ROW_GROUP)):
            columns: list[Any] = [
                pa.array([_text(value) for value in column], kind)
                for column, kind in zip(zip(*piece, strict=True), types, strict=True)
            ]
            for token, x in features.items():
                values = np.ascontiguousarray(x[start : start + len(piece)]).reshape(-1)
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values), type=lists[token]))
            file.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROW_GROUP)
            start += len(piece)


def _text(value: Any) -> Any:
    """Parquet takes no file name that is no UTF-8: such bytes are shown as \\xff."""
    if not isinstance(value, str):
        return value
    return value.encode(errors="surrogateescape").decode(errors="backslashreplace")
