"""What every logged number means: in short what the pages of `docs/methods` say.  (A test compares the two.)"""

from triptych.recipe import Recipe

# name -> unit, meaning
ALWAYS: dict[str, tuple[str, str]] = {
    "loss": ("", "what is minimised"),
    "lr": ("", "learning rate of the step, as the optimiser uses it"),
    "weight_decay": ("", "weight decay of the step"),
    "images_per_second": ("images/s", "images of a step over all processes, divided by the seconds that it took"),
    "data_wait": ("share", "share of the step's time in which the loader was waited for, 0 to 1"),
    "health/feature_std": (
        "0 to 1",
        "spread of the teacher's features: 1 = evenly in all directions, 0 = all the same",
    ),
    "health/rankme": ("dimensions", "effective rank of the teacher's features (RankMe), 1 to the encoder's width"),
    "health/teacher_entropy": ("nats", "mean entropy of the teacher's distributions over the prototypes"),
    "health/teacher_entropy_share": (
        "share of ln K",
        "entropy of the teacher's distributions over ln K. Near 1 for long: collapse to the uniform answer; near 0 "
        "together with a small batch_entropy_share: collapse onto one prototype",
    ),
    "health/batch_entropy_share": (
        "share of ln K",
        "entropy of the mean distribution over ln K: how many prototypes are in use",
    ),
    "health/agreement": (
        "share",
        "share of images for which student and teacher, on different views, name the same prototype",
    ),
    "health/knn": (
        "%",
        "weighted k-NN accuracy on a quarter of the sample against the rest (k neighbours, `health.k` of the recipe)",
    ),
}

_ALIKE = "when all vectors are alike"
_MEAN_COLOUR = (
    "mean absolute error in normalised space, whose unit is a channel's standard deviation. Always answering the mean "
    "colour costs about 0.8"
)

# method -> term -> meaning
OF_METHOD: dict[str, dict[str, str]] = {
    "dino": {
        "dino": "mean cross-entropy over images and pairs of different views, in nats. ln K = the student knows "
        "nothing. It is not a progress bar: the target moves, so it can rise while the features improve"
    },
    "udi": {
        "class": "cross-entropy in nats, before its weight; no progress bar",
        "class+": "cross-entropy in nats, before its weight; no progress bar",
        "patch": "cross-entropy in nats, before its weight; no progress bar",
    },
    "ibot": {
        "class": "L_[CLS] before its weight, in nats: DINO's loss, with ln K as its value for a student that knows "
        "nothing",
        "patch": "L_MIM before its weight, in nats. Crops without masked patches count as 0, so it is low while few "
        "are masked",
    },
    "hssl": {
        "class": "ℓ(z_base^s, z_head^t), before its ½, in nats",
        "head": "ℓ(z_head^s, z_head^t), before its ½",
        "patch": "ℓ_patch, as iBOT's",
    },
    "mocov3": {
        "mocov3": f"both directions added. 4τ ln B, with B the images of a forward pass over all processes, {_ALIKE}"
    },
    "byol": {
        "byol": "both directions added: 0 = all predictions right, 4 = orthogonal, 8 = opposite. A collapsed encoder "
        "also gives 0: look at the health"
    },
    "moby": {
        "moby": f"both directions added, in nats. 2 ln(1 + queue) {_ALIKE}. The queues start with random vectors, "
        "which are easy negatives: it rises when they fill"
    },
    "simclr": {
        "simclr": "both directions added, in nats: twice the mean over all crops that other libraries print. "
        f"2 ln(2B − 1), with B the images of a forward pass over all processes, {_ALIKE}"
    },
    "swav": {"swav": "mean cross-entropy in nats. ln K = the predictions know nothing"},
    "mmc": {
        "pixels": f"L_MIM before its weight: {_MEAN_COLOUR}",
        "patch": "L_PAT before its weight, its scale included",
        "class": "L_CLS before its weight, its scale included",
    },
    "mae": {
        "pixels": "mean squared error of the dropped patches. With norm_pixels 1 = every patch is said to be its own "
        "mean. It is a progress bar, unlike the losses with moving targets"
    },
    "msn": {
        "match": "mean of H(p⁺, p) in nats. About ln K when nothing is learned; no progress bar, 0 is also that of a "
        "collapsed encoder",
        "memax": "ln K − H(mean p) before its weight: 0 = prototypes are used evenly, ln K = all anchors choose one "
        "(collapse)",
        "entropy": "mean entropy of the anchors' p, before its weight",
    },
    "sit": {
        "class": "L_CLS, both directions added. 4τ ln B, with B the images of a forward pass over all processes, "
        f"{_ALIKE}",
        "pixels": f"L_MIM before λ: {_MEAN_COLOUR}",
    },
    "gmml": {
        "pixels": "mean absolute error over the replaced pixels in normalised space, whose unit is a channel's "
        "standard deviation. Always answering the mean colour costs about 0.8. This one is a progress bar: the target "
        "does not move"
    },
    "mcssl": {
        "class": "L_CLS before its weight, in nats: DINO's loss. ln K = the student knows nothing",
        "patch": "L_PAT before its weight, in nats; likewise ln K",
        "pixels": "L_MIM before its weight: mean squared error in normalised space. Always answering the mean colour "
        "costs about 1",
    },
    "mte": {
        "ensemble": "L_aux = ℓ(z_a^s, z_a^t) of the fused vectors, with the base's own weight in it but without w₁",
        "distill": "L_distill = ℓ(z_g^s, z_a^t), likewise without w₂",
    },
    "supervised": {
        "classes": "CE(o_g, y), without auxiliary tokens. Smoothed and mixed labels keep it well above 0",
        "ensemble": "CE(o_a, y), with auxiliary tokens",
        "distill": "CE(o_g, softmax(sg[o_a])), with auxiliary tokens",
    },
}


def unit(name: str) -> str:
    return ALWAYS.get(name, ("", ""))[0]


def meaning(name: str, recipe: Recipe | None) -> str:
    """'' where nothing is written down."""
    if name in ALWAYS:
        return ALWAYS[name][1]
    for method in methods(recipe):
        if name in OF_METHOD.get(method, {}):
            return OF_METHOD[method][name]
    return ""


def methods(recipe: Recipe | None) -> list[str]:
    """The run's method and what it wraps: names of pages in docs/methods."""
    if recipe is None:
        return []
    base = getattr(recipe.method, "base", None)
    return [recipe.method.name, *([base.name] if base else [])]
