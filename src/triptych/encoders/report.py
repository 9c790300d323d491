"""What became of every tensor of a file of weights."""

from collections import Counter
from dataclasses import dataclass

from triptych.errors import UserError


@dataclass(frozen=True)
class Report:
    """Names of tensors.  `missing` has the encoder's names (timm's), the others the file's."""

    origin: str  # the code base that wrote the file, as recognised
    part: str  # which encoder of the file: "teacher, from teacher.backbone.*"
    matched: tuple[str, ...]  # became weights of the encoder
    missing: tuple[str, ...]  # weights of the encoder that the file lacks: they stay random
    unexpected: tuple[str, ...]  # neither the encoder's nor known to be something else; or of another shape
    ignored: tuple[str, ...]  # known not to be the encoder's: heads, decoders, mask tokens, the other encoder

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unexpected

    def text(self, names: int = 4) -> str:
        """One line on the whole; then, where something is wrong or left out, one line each with the first names."""
        counts = {kind: len(getattr(self, kind)) for kind in ("matched", "missing", "unexpected", "ignored")}
        lines = [f"{self.origin}; {self.part}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())]
        lines += [_first(kind, getattr(self, kind), names) for kind in ("missing", "unexpected") if counts[kind]]
        if self.ignored:
            kinds = Counter(_stem(name) for name in self.ignored)
            lines.append("  ignored: " + ", ".join(f"{stem} ({n})" for stem, n in kinds.most_common()))
        return "\n".join(lines)

    def check(self, file: object, what: str, partial: bool) -> None:
        """Raises UserError for a match that is not complete, unless `partial`; and for one of nothing."""
        if self.complete or (partial and self.matched):
            return
        raise UserError(
            f"{file}: not the state dict of {what}\n{self.text()}\n"
            "--partial (partial=True) takes what fits and leaves missing weights random"
        )


def _first(kind: str, entries: tuple[str, ...], names: int) -> str:
    more = f", and {len(entries) - names} more" if len(entries) > names else ""
    return f"  {kind}: {', '.join(entries[:names])}{more}"


def _stem(name: str) -> str:
    """'model.decoder_norm.bias' -> 'decoder_norm', 'student.module.head.mlp.0.weight' -> 'student.head'"""
    steps = [step for step in name.split(".") if step not in ("model", "state_dict", "module")]
    return ".".join(steps[: 2 if steps[0] in ("teacher", "student") else 1])
