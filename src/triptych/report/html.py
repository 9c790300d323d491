"""HTML from nested calls, escaped unless it is HTML already."""

from collections.abc import Iterable
from html import escape

_VOID = ("meta", "img", "input", "br")


class Html(str):
    """Text that needs no escaping."""

    __slots__ = ()

    def __add__(self, other: object) -> "Html":  # type: ignore[override]  what is added is escaped as everywhere
        return join([self, other])


def text(value: object) -> Html:
    """What a reader sees as this value; Html stays as it is."""
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def join(parts: Iterable[object]) -> Html:
    return Html("".join(text(part) for part in parts))


def el(tag: str, *children: object, **attributes: object) -> Html:
    """An element.  `class_` is class, `data_lines` data-lines; None and False leave one out, True has no value.

    Children and values are escaped unless they are Html; tag and names of attributes are never a user's.
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f'{name}="{text(value)}"')
    start = f"<{' '.join(words)}>"
    return Html(start) if tag in _VOID else Html(f"{start}{join(children)}</{tag}>")


def table(head: Iterable[object], rows: Iterable[Iterable[object]], numbers: int = 0, caption: str = "") -> Html:
    """A table in a box of its own that scrolls sideways.  numbers: so many last columns are set to the right."""
    names = list(head)
    first = len(names) - numbers

    def cells(tag: str, row: Iterable[object]) -> Html:
        return join(el(tag, cell, class_="number" if i >= first else None) for i, cell in enumerate(row))

    body = join(el("tr", cells("td", row)) for row in rows)
    drawn = el("table", el("thead", el("tr", cells("th", names))), el("tbody", body))
    box = el("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")
    return el("p", caption, class_="caption") + box if caption else box


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Names and what belongs to them."""
    return el("dl", join(join((el("dt", name), el("dd", value))) for name, value in pairs))


def folded(summary: object, *children: object, open_: bool = False) -> Html:
    return el("details", el("summary", summary), *children, open=open_)


def number(value: float, digits: int = 4) -> str:
    """'0.0001234', '1.2e-7', '12 345'"""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if abs(value) >= 10000 and abs(value) < 1e9:
        return f"{value:,.0f}".replace(",", " ")
    shown = f"{value:.{digits}g}"
    mantissa, e, power = shown.partition("e")
    return f"{mantissa}e{int(power)}" if e else shown
