"""`triptych report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def report(
    *runs: Annotated[Path, Parameter(help="Folders of runs, at most 8; several are compared.")],
    out: Path | None = None,
    results: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative="")] = None,
    data: str | None = None,
    sample: Annotated[int, Parameter(validator=Number(gte=0))] = 1000,
) -> None:
    """Write one HTML file on what runs did: curves, health, evaluations, pictures, data, cost.  It needs no network.

    Parameters
    ----------
    out
        The file.  Default: report.html in the first run's folder.
    results
        Files of evaluations.  Default: results.jsonl here and in the runs' folders.
    data
        The training images, for their audit.  Default: where the first run found them.
    sample
        At most so many images are decoded for the audit, 0 = no audit.
    """
    from rich.console import Console

    from triptych.errors import UserError
    from triptych.progress import reporting
    from triptych.report.page import report as write

    if not runs:
        raise UserError("no run is given: name the folder that `triptych train` wrote")
    with reporting(Console(stderr=True)):
        print(write(runs, out=out, results=results, data=data, sample=sample))
