"""Evaluations: the only list."""

EVALS = {
    "knn": "weighted nearest neighbours on frozen features: triptych eval knn MODEL --data DATA",
    "linear": "a linear classifier on frozen features: triptych eval linear MODEL --data DATA",
    "tokens": "what each auxiliary token knows, and what their removal costs: triptych eval tokens RUN --data DATA",
    "classify": "the classifiers of a supervised run: triptych eval classify RUN --data DATA",
    "variance": "how much tokens vary under crops and under masking: triptych eval variance MODEL --data DATA",
    "reconstruction": "a picture of the pixels that each block gives: triptych eval reconstruction RUN --data DATA",
    "patches": "what patch tokens share, and whether they tell their position: triptych eval patches MODEL --data DATA",
    "gradients": "how hard each term of a loss pulls at the encoder: triptych eval gradients RUN --data DATA",
}
