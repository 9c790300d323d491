"""Outcomes of several encoders side by side: what a person reads, on the console and in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych.evals.outcome import Figure, Outcome
from triptych.evals.published import published
from triptych.evals.published_dense import published_dense

Label = tuple[str, str, str]  # protocol, setting, figure


@dataclass
class SideBySide:
    """Figures on one set of images: a row per figure, a column per encoder."""

    data: str  # as the reader named it
    known: str  # as papers do
    encoders: list[str] = field(default_factory=list)
    rows: dict[Label, dict[str, Figure]] = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)  # protocols and why, in order

    def add(self, encoder: str, outcome: Outcome) -> None:
        if encoder not in self.encoders:
            self.encoders.append(encoder)
        for figure in outcome.figures:
            if figure.main:
                self.rows.setdefault((outcome.protocol, outcome.setting, figure.name), {})[encoder] = figure

    def head(self) -> list[str]:
        return ["protocol", "on", "figure", *self.encoders]

    def lines(self) -> list[list[str]]:
        """Protocol, on what, figure, one text per encoder."""
        texts = ([row[e].text() if e in row else "-" for e in self.encoders] for row in self.rows.values())
        return [[*label, *text] for label, text in zip(self.rows, texts, strict=True)]

    def remarks(self) -> list[str]:
        """How figures came about, each once, and what is missing."""
        notes: dict[str, None] = {}
        for (protocol, _, name), found in self.rows.items():
            notes |= {f"{protocol}, {name}: {f.note}": None for f in found.values() if f.note}
        return [*notes, *(f"left out: {' '.join(why.split())}" for why in self.left_out)]

    def markdown(self) -> str:
        """The table, remarks, and what papers report on the set."""
        rule = ["---"] * 3 + ["---:"] * len(self.encoders)
        text = [f"### {self.data}", "", *map(_row, [self.head(), rule, *self.lines()])]
        if remarks := self.remarks():
            text += ["", *(f"- {remark}" for remark in remarks)]
        protocols = dict.fromkeys(protocol for protocol, _, _ in self.rows)
        reported = published(self.known, set(protocols))
        reported += [row for protocol in protocols for row in published_dense(self.known, protocol)]
        if reported:
            text += ["", "Reported by the papers for encoders of theirs (not measured here):", ""]
            text += [_row(["protocol", "figure", "encoder", "reported"]), _row(["---"] * 3 + ["---:"])]
            text += [_row([p.protocol, p.figure, p.encoder, f"{p.value:g}"]) for p in reported]
        return "\n".join(text) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
