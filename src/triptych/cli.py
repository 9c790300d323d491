"""The command line.  Nothing heavy is imported before a command needs it: --help and completion stay quick."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from triptych import __version__
from triptych.cli_eval import Count, Model, Pixels, Weights, evaluate
from triptych.cli_report import report
from triptych.cli_show import pictures
from triptych.errors import Interrupted, NonFinite, UserError

app = App(
    name="triptych",
    help="Pre-train vision encoders on your own images, and see how good they are.",
    version=__version__,
)
app.command(evaluate)
app.command(pictures)
app.command(report)
for more in ("dense", "runs", "sets"):  # their commands register themselves
    import_module(f"triptych.cli_eval_{more}")

DEFAULT = Weights()
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


@app.command
def train(
    *overrides: Overrides,
    data: str | None = None,
    recipe: str = "udi_small",
    config: Path | None = None,
    out: Path | None = None,
    show: bool = False,
) -> None:
    """Pre-train an encoder on images.  The same command goes on with a run that was stopped.

    Every field of the recipe can be set by its dotted name: `--epochs 50 --method.alpha 0.3`; `--show` lists them.

    Parameters
    ----------
    data
        Folder, .zip, .tar, list of paths (.txt) or data set name; see `triptych list`.  The only required argument.
    recipe
        Name of a recipe; see `triptych list`.
    config
        YAML file of recipe fields, such as a run's recipe.yaml; the command line wins over it.
    out
        Folder of the run.  Default: runs/RECIPE-DATA.
    show
        Print the resolved recipe and where each value comes from, then stop.
    """
    from triptych import commands

    commands.train(data, recipe, config, out, show, list(overrides))


@app.command
def ablate(
    *overrides: Overrides,
    data: str,
    test: str | None = None,
    recipe: str = "mmc_small",
    finetune: str = "finetune_small",
    rows: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    k: int = 10,
    out: Path = Path("runs/ablation"),
) -> None:
    """MMC's Table 4: train every combination of its three losses, k-NN on class and patch tokens, fine-tune.

    The same command goes on with what was stopped.  Settings of the recipe are given as for `train`, those of the
    fine-tuning with the prefix `tuning.`: `--epochs 50 --tuning.epochs 20`.

    Parameters
    ----------
    data
        Labelled images; labels are used by k-NN and fine-tuning only.
    test
        Labelled images to measure on.  Default: the data's own held-out part.
    recipe
        A recipe of MMC; see `triptych list`.
    finetune
        A recipe of supervised training, or none.
    rows
        Combinations such as pixels or patch+class.  Default: all seven.
    k
        Number of neighbours.
    out
        Folder of the runs.
    """
    from triptych import commands

    tuned = None if finetune == "none" else finetune
    commands.ablate(data, test, out, list(overrides), recipe=recipe, finetune=tuned, rows=rows, k=k)


@app.command
def cost(*overrides: Overrides, recipe: str = "udi_small", config: Path | None = None, size: Pixels = None) -> None:
    """Print what each part of a method costs: multiply-accumulates and parameters, in training and after it.

    Fields of the recipe are set as for `train`: `--encoder.arch vit_base_patch16_224 --method.pooled 3`.

    Parameters
    ----------
    recipe
        Name of a recipe; see `triptych list`.
    config
        YAML file of recipe fields, such as a run's recipe.yaml; the command line wins over it.
    size
        Pixels of the image.  Default: the recipe's global crops.
    """
    from triptych import commands

    commands.cost(recipe, config, list(overrides), size)


@app.command
def bench(
    *overrides: Overrides,
    recipe: str = "udi_small",
    config: Path | None = None,
    data: str | None = None,
    parts: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    steps: int = 5,
    out: Path = Path("results.jsonl"),
) -> None:
    """Measure on this machine what a recipe costs: its training step, its loader, k-NN and feature extraction.

    Fields of the recipe are set as for `train`: `--batch 128 --precision bf16`.

    Parameters
    ----------
    recipe
        Name of a recipe; see `triptych list`.
    config
        YAML file of recipe fields, such as a run's recipe.yaml; the command line wins over it.
    data
        Images to train on, as for `train`.  Default: drawn scenes.
    parts
        Of step, data, knn, inference (default: these four) and syncs, which names what makes the host wait for a GPU.
    steps
        Repetitions that count.
    out
        File that the results are appended to as JSON lines.
    """
    from triptych.bench import bench as run

    run(recipe, config, list(overrides), data=data, parts=parts, steps=steps, out=out)


@app.command(name="list")
def list_() -> None:
    """Print all methods, encoders, recipes, sources and evaluations."""
    from triptych import commands

    commands.list_all()


@app.command
def quickstart(out: Path = Path("quickstart")) -> None:
    """Draw a small data set, pre-train a small ViT on it with UDI, and show what it learned (under 3 minutes).

    Parameters
    ----------
    out
        Folder that receives the images, the run, the picture and the exported encoder; must be new or empty.
    """
    from triptych.quickstart import quickstart as run

    run(out)


@app.command
def export(model: Model, *, out: Path, weights: Literal["teacher", "student"] = "teacher", size: Pixels = None) -> None:
    """Write an encoder for other software: safetensors, config and model card; loads in timm.

    Parameters
    ----------
    out
        New folder.
    weights
        Of a run.
    size
        Pixels of the images that the written config expects.  Default: what it was trained on.
    """
    from triptych import commands

    commands.export(model, out, weights, size)


@app.command
def embed(
    model: Model,
    *,
    data: str,
    out: Path,
    token: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    layers: Count = 1,
    size: Pixels = None,
    half: Annotated[bool, Parameter(negative="")] = False,
    options: Weights = DEFAULT,
) -> None:
    """Write the features of every image to a file.  The same command goes on with what was stopped.

    Parameters
    ----------
    data
        Images, labelled or not.
    out
        FILE.npy (with FILE.rows.csv, which names the images), FILE.parquet or FILE.csv.
    token
        One or several of cls, cls_plus, patch_mean, cls+patch_mean, cls_raw, cls+gem, attended_N.  Default: cls.
    layers
        Class tokens of so many last blocks, concatenated.
    size
        Pixels of the images.  Default: what the encoder was trained on.
    half
        float16 numbers instead of float32.
    """
    from triptych import run_embed

    run_embed.run(model, data, out, token=token or ["cls"], layers=layers, size=size, half=half, **vars(options))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: users' mistakes end with a message and exit code 2."""
    try:
        app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    except (UserError, OSError) as error:  # OSError: a path that cannot be read or written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on from here")
        sys.exit(stopped.exit_code)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
