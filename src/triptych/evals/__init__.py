"""Evaluations: the only list."""

EVALS = {
    "knn": "weighted nearest neighbours on frozen features: triptych eval knn MODEL --data DATA",
    "linear": "a linear classifier on frozen features: triptych eval linear MODEL --data DATA",
}
