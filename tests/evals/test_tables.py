"""Several encoders side by side: nothing is lost, remarks stand once, papers' figures stand apart."""

from triptych.data.subsets import IMAGENET100
from triptych.evals.outcome import Figure, Outcome
from triptych.evals.published import known_set, published
from triptych.evals.tables import SideBySide


def outcome(value: float, **figure) -> Outcome:
    return Outcome(
        "knn", "cls", {}, None, [Figure("top-1 %, k = 10", value, **figure), Figure("minor", 1.0, main=False)]
    )


def test_a_row_per_figure_and_a_column_per_encoder():
    table = SideBySide("my|set", "my|set")
    table.add("run", outcome(61.204, margin=0.5, note="600 episodes"))
    table.add("run (untrained)", outcome(30.0, note="600 episodes"))
    table.add("another", Outcome("cka", "", {}, None, [Figure("cls and patch_mean", 0.5)]))
    assert table.lines() == [
        ["knn", "cls", "top-1 %, k = 10", "61.20 ± 0.50", "30.00", "-"],
        ["cka", "", "cls and patch_mean", "-", "-", "0.50"],
    ]
    assert table.remarks() == ["knn, top-1 %, k = 10: 600 episodes"]
    table.left_out["fewshot: too few\nimages"] = None
    text = table.markdown()
    assert "### my|set" in text
    assert "- left out: fewshot: too few images" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1  # every row has as many cells


def test_figures_of_papers_stand_apart_and_only_for_their_own_sets():
    class Classes:
        def __init__(self, name, classes):
            self.name, self.classes = name, classes

    thousand = [*IMAGENET100, *(f"n{i:08d}" for i in range(900))]
    assert known_set(Classes("/data/in1k [val]", thousand)) == "imagenet"
    assert known_set(Classes("imagenet100@/data", IMAGENET100)) == "imagenet100"
    assert known_set(Classes("cifar100:test@/data [test]", ["apple", "beaver"])) == "cifar100"
    table = SideBySide("in1k", "imagenet")
    table.add("run", outcome(61.2))
    text = table.markdown()
    assert "not measured here" in text
    assert "| knn | top-1 %, k = 10 | MTE over DINO ViT-S/16 100 ep | 66.6 |" in text
    assert "linear" not in text  # not a protocol of this table
    assert not published("imagenette", {"knn"})
