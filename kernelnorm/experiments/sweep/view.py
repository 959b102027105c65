"""What a sweep prints: before, during and after its runs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from kernelnorm.experiments.status import Status, seconds_left, seconds_per_epoch
from kernelnorm.experiments.style import LABELS

__all__ = ["View", "duration", "forecast", "table"]


def table(statuses: Sequence[Status], note: str = "") -> list[str]:
    """Return the lines of a table with a row for each run, below a note if there is one."""
    headings = ("norm", "batch size", "lr", "seed", "rules", "status", "accuracy", "s/epoch")
    rows = [headings, *(_row(status) for status in statuses)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in zip(*columns, strict=True)]
    return [note, *lines] if note else lines


def _row(status: Status) -> tuple[str, ...]:
    config, history = status.config, status.history
    seconds = seconds_per_epoch([status], config)
    return (
        LABELS[config.norm],
        str(config.batch_size),
        f"{config.lr:g}",
        str(config.seed),
        config.variant,
        status.state,
        f"{status.result:.2%}" if status.state == "done" else "-",
        f"{seconds:.2f}" if history else "-",
    )


def duration(seconds: float) -> str:
    """Return a time as text, such as ``"3 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def forecast(statuses: Sequence[Status], of: Sequence[Status], jobs: float) -> str:
    """Return as text how long the runs ``of`` will take, estimated from those of ``statuses``."""
    seconds, unknown = seconds_left(statuses, of)
    if unknown == sum(status.epochs_left > 0 for status in of):
        return "unknown" if unknown else "none"
    return "more than " * bool(unknown) + duration(seconds / jobs)


class View:
    """The progress of a sweep: on a terminal a table of norms and batch sizes with a bar below it,
    elsewhere a line for each run that ends.

    Args:
        note: the text above the table.
        jobs: how many runs are executed in parallel.
    """

    def __init__(self, note: str, jobs: float) -> None:
        self._jobs, self._height = jobs, 0
        self._live = sys.stdout.isatty()
        if note:
            print(note, flush=True)
        self._bar: tqdm[Any] = tqdm(
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs, {elapsed}{postfix}",
            file=sys.stdout,
            dynamic_ncols=True,
            leave=False,
            disable=not self._live,
            total=1,
        )

    def show(self, statuses: Sequence[Status], ended: Sequence[Status]) -> None:
        """Show the progress of the runs.

        Args:
            statuses: the statuses of all runs.
            ended: the statuses of the runs that have just ended.
        """
        if not self._live:
            for status in ended:
                print(self._line(status, statuses), flush=True)
            return
        lines = _cells(statuses, self._jobs, shutil.get_terminal_size().lines - 3)
        self._bar.clear()
        back = f"\x1b[{self._height}F\x1b[J" if self._height else ""
        sys.stdout.write(back + "".join(f"{line}\n" for line in lines))
        self._height = len(lines)
        self._bar.total = sum(status.config.epochs for status in statuses)
        self._bar.n = self._bar.total - sum(status.epochs_left for status in statuses)
        self._bar.set_postfix_str(f"{forecast(statuses, statuses, self._jobs)} left")

    def _line(self, status: Status, statuses: Sequence[Status]) -> str:
        config = status.config
        over = sum(other.result is not None for other in statuses)
        rules = f" {config.variant}" if config.variant else ""
        end = f"{status.result:.2%}" if status.state == "done" else status.state
        return (
            f"{over}/{len(statuses)}  {LABELS[config.norm]} b{config.batch_size}{rules} "
            f"lr {config.lr:g} seed {config.seed}: {end}"
            f"{': ' * bool(status.message)}{status.message}; "
            f"time left: {forecast(statuses, statuses, self._jobs)}"
        )

    def close(self) -> None:
        """Remove the bar; the table stays."""
        self._bar.close()


def _cells(statuses: Sequence[Status], jobs: float, most: int) -> list[str]:
    """Return the lines of the table of norms and batch sizes, or of a part of it if it is long."""
    cells: dict[tuple[str, int], list[Status]] = {}
    for status in statuses:
        cells.setdefault((status.config.norm, status.config.batch_size), []).append(status)
    heading = f"{'norm':>16}  batch size  done  running  failed  to do  time left"
    rows = []
    for (norm, batch_size), of in cells.items():
        states = [status.state for status in of]
        done = sum(status.result is not None for status in of)
        running, failed = states.count("running"), states.count("failed")
        left = forecast(statuses, of, jobs) if done < len(of) else ""
        rows.append(
            f"{LABELS[norm]:>16}  {batch_size:10}  {done:4}  {running:7}  {failed:6}  "
            f"{len(of) - done - running - failed:5}  {left:>9}"
        )
    if len(rows) > most:
        of_interest = [
            row
            for row, of in zip(rows, cells.values(), strict=True)
            if any(status.state in ("running", "failed") for status in of)
        ][: max(0, most - 1)]
        rows = [*of_interest, f"{'...':>16}  and {len(rows) - len(of_interest)} more"]
    return [heading, *rows]
