"""The tables and pictures of a chapter, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass

from kernelnorm.experiments.report.collect import STATES
from kernelnorm.experiments.statistics import Difference, Estimate

__all__ = [
    "Entry",
    "Picture",
    "Table",
    "estimate_entry",
    "estimate_text",
    "interval_entry",
    "number_entry",
    "ratio_entry",
    "rounded_entry",
    "signed",
    "states_text",
]


@dataclass(frozen=True)
class Entry:
    """One entry of a table.

    Args:
        text: the text that is shown.
        number: the sort key; entries with ``None`` come after all numbers, sorted by their text.
        note: a second line, such as the paper's value.
    """

    text: str
    number: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its heading and a note.

    Args:
        title: the heading above the table.
        head: the headings of the columns.
        rows: the entries.
        note: the text below the table.
        folded: whether the HTML page shows the table collapsed at first, because it is long.
    """

    title: str
    head: list[str]
    rows: list[list[Entry]]
    note: str
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG, with its texts.

    Args:
        title: the heading.
        alt: the text for readers who do not see the picture.
        note: the caption.
        png: the file's content.
    """

    title: str
    alt: str
    note: str
    png: bytes


def number_entry(value: int) -> Entry:
    """Return a whole number."""
    return Entry(str(value), value)


def rounded_entry(value: float | None, factor: float = 1) -> Entry:
    """Return a number times ``factor``, with three digits below 100, else as an integer."""
    if value is None:
        return Entry("-")
    value *= factor
    return Entry(f"{value:,.0f}" if value >= 100 else f"{value:.3g}", value)


def signed(value: float) -> str:
    """Return a difference with two decimals and its sign; zero has no sign."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text


def estimate_text(found: Estimate) -> str:
    """Return the mean, with the deviation if there is one."""
    spread = "" if found.deviation is None else f" ± {found.deviation:.2f}"
    return f"{found.mean:.2f}{spread}"


def estimate_entry(found: Estimate | None) -> Entry:
    """Return mean and deviation, or a dash."""
    return Entry(estimate_text(found), found.mean) if found else Entry("-")


def interval_entry(found: Difference | None) -> Entry:
    """Return the interval, sorted by its lower end, or why there is none."""
    if found is None or found.interval is None:
        return Entry("fewer than two pairs: no interval")
    low, high = found.interval
    return Entry(f"{signed(low)} to {signed(high)}", low)


def ratio_entry(value: float | None, base: float | None) -> Entry:
    """Return ``value / base``, or a dash if one of them is ``None``."""
    if value is None or base is None:
        return Entry("-")
    return Entry(f"{value / base:.2f}", value / base)


def states_text(states: dict[str, int]) -> str:
    """Return the number of runs in each state, in words."""
    return ", ".join(f"{states[state]} {state}" for state in STATES if states.get(state))
