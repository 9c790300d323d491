"""`triptych embed`: an encoder and images from the command line, features in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triptych.data.sources import open_source
from triptych.embed import EmbedResult, check, embed
from triptych.embed_files import check_out
from triptych.encoders.load import Weights, load_encoder
from triptych.evals.transform import EvalTransform
from triptych.evaluation import check_file_options, console, device, say
from triptych.progress import reporting


def run(
    model: str,
    data: str,
    out: Path,
    *,
    token: Sequence[str] = ("cls",),
    layers: int = 1,
    size: int | None = None,
    weights: Weights = "teacher",
    half: bool = False,
    **file: Any,
) -> EmbedResult:
    """`embed` of a model as `load_encoder` takes it and images as `open_source` does.

    token: one or several; size: pixels, None = what the encoder was trained on; file: arch, heads, origin and partial
    of `load_encoder`.  Tells what was written.  Raises UserError for mistakes before any work, and as `embed` does;
    Interrupted.
    """
    check_out(out)  # before minutes of loading
    out.parent.mkdir(parents=True, exist_ok=True)
    check_file_options([model], file)
    source, loaded = open_source(data), load_encoder(model, weights=weights, **file)
    check(loaded.encoder, out, token, layers)
    if loaded.report is not None:
        say(loaded.report.text())
    pixels = loaded.size if size is None else size
    loaded.encoder.grid(pixels, pixels)
    transform = EvalTransform.of(pixels, loaded.mean, loaded.std)
    options = {"tokens": token, "layers": layers, "half": half}
    with reporting(console):
        result = embed(loaded.encoder, source, transform, out, device=device(), model=loaded.name, **options)
    if result.unreadable:
        some = ", ".join(result.unreadable[:3]) + (" ..." if len(result.unreadable) > 3 else "")
        say(f"{len(result.unreadable)} of {len(source)} images of {source.name} cannot be read and have no row: {some}")
    width = ", ".join(f"{name} {count}" for name, count in result.width.items())
    say(f"{', '.join(map(str, result.files))}: {result.images} images; numbers for each: {width}")
    say(f"what they are: {out}.json")
    return result
