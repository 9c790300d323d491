"""Fine-tuning as a protocol: train a recipe from an encoder on labels, then measure the classifier it trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console

from triptych import distributed
from triptych.data.loader import check_labels
from triptych.data.sources import Source
from triptych.encoders.load import load_method
from triptych.errors import UserError
from triptych.evals.classify import classify
from triptych.evals.transform import EvalTransform
from triptych.methods import SupervisedConfig
from triptych.methods.supervised import Supervised
from triptych.recipe import Recipe, of_source
from triptych.train import train as run


@dataclass(frozen=True)
class FinetuneResult:
    """Accuracies in percent on the test images, after the last epoch: none is chosen on them."""

    top1: float  # of the weights as trained: what the authors' scripts measure
    top5: float
    average_top1: float | None  # of the moving average of weights, where the recipe has one
    average_top5: float | None
    recipe: str
    run: str  # folder
    epochs: int
    batch: int  # images per step
    lr: float  # peak, per 256 images
    layer_decay: float  # γ; 1 = every layer at the same rate
    projection: int  # width of the pre-training head's first layer, which was kept; 0 = none
    size: int  # pixels of the test images
    train_images: int
    test_images: int  # that could be read
    classes: int


def finetune(
    model: str, train: Source, test: Source, *, recipe: Recipe, out: Path, console: Console | None = None
) -> FinetuneResult | None:
    """Fine-tune `model` on `train` by a recipe of supervised training, and measure it on `test`.

    model: what `--encoder.weights` takes: a run, a checkpoint of one, an export, a file of weights.  out: the folder of
    a run like any other; the same call goes on where it was stopped, and measures again where it is finished.  Test
    images: shorter side to 256/224 of the crop, centre crop.  Raises UserError, and what `train.train` raises.

    Under torchrun all processes train; the first one measures, the others return None.
    """
    recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"weights": model})})
    if not isinstance(recipe.method, SupervisedConfig):
        raise UserError(f"{recipe.name} trains {recipe.method.name}, without labels: give a recipe of fine-tuning")
    config = cast(SupervisedConfig, of_source(recipe, train).method)
    if train.classes != test.classes:
        raise UserError(f"{train.name} and {test.name} do not have the same classes: labels would not fit")
    check_labels(test)  # now, not after the training
    run(recipe, train, out, console)
    if not distributed.is_main():
        return None
    trained = cast(Supervised, load_method(out)[1])
    transform = EvalTransform.of(recipe.views.global_size, recipe.views.mean, recipe.views.std)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last = classify(trained, test, transform, average=False, device=device)
    mean = classify(trained, test, transform, device=device) if config.average else None
    return FinetuneResult(
        top1=last.top1["global"],
        top5=last.top5["global"],
        average_top1=mean.top1["global"] if mean else None,
        average_top5=mean.top5["global"] if mean else None,
        recipe=recipe.name,
        run=str(out),
        epochs=recipe.epochs,
        batch=recipe.batch,
        lr=recipe.optim.lr,
        layer_decay=recipe.optim.layer_decay,
        projection=config.projection,
        size=transform.size,
        train_images=len(train),
        test_images=last.images,
        classes=last.classes,
    )
