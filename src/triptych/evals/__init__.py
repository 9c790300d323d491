"""Evaluations: the only list."""

EVALS = {
    "all": "every frozen protocol over encoders and sets, in one table: triptych eval all MODEL ... --data DATA ...",
    "knn": "weighted nearest neighbours on frozen features: triptych eval knn MODEL --data DATA",
    "linear": "a linear classifier on frozen features: triptych eval linear MODEL --data DATA",
    "logistic": "logistic regression on few labels: triptych eval logistic MODEL --data DATA",
    "fewshot": "5-way 1-shot episodes and threshold F1: triptych eval fewshot MODEL --data DATA",
    "clustering": "k-means of features against the classes: triptych eval clustering MODEL --data DATA",
    "cka": "how alike tokens and encoders are: triptych eval cka MODEL ... --data DATA",
    "retrieval": "mean average precision of queries in a gallery: triptych eval retrieval MODEL --data DATA",
    "copy": "find the original of altered copies: triptych eval copy MODEL --data COPYDAYS",
    "finetune": "train the whole encoder on labels, then measure: triptych eval finetune MODEL --data DATA",
    "classify": "the classifiers of a supervised run: triptych eval classify RUN --data DATA",
    "prototypes": "unsupervised classification by a run's prototypes: triptych eval prototypes RUN --data DATA",
    "tokens": "what each auxiliary token knows, and what their removal costs: triptych eval tokens RUN --data DATA",
    "variance": "how much tokens vary under crops and under masking: triptych eval variance MODEL --data DATA",
    "reconstruction": "a picture of the pixels that each block gives: triptych eval reconstruction RUN --data DATA",
    "patches": "what patch tokens share, and whether they tell their position: triptych eval patches MODEL --data DATA",
    "gradients": "how hard each term of a loss pulls at the encoder: triptych eval gradients RUN --data DATA",
}
