"""MMC's Table 4: every combination of its three losses."""

# Row of the table -> weights of L_MIM, L_PAT, L_CLS (`--method.weights`), in the paper's order.
COMBINATIONS: dict[str, tuple[int, int, int]] = {
    "pixels": (1, 0, 0),
    "class": (0, 0, 1),
    "patch": (0, 1, 0),
    "patch+class": (0, 1, 1),
    "pixels+patch": (1, 1, 0),
    "pixels+class": (1, 0, 1),
    "pixels+patch+class": (1, 1, 1),
}
