"""The tables of a section."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernelnorm.experiments.paper import paper, paper_accuracy, paper_lr, paper_time
from kernelnorm.experiments.report.blocks import (
    Entry,
    Table,
    estimate_entry,
    estimate_text,
    interval_entry,
    number_entry,
    ratio_entry,
    signed,
    states_text,
)
from kernelnorm.experiments.report.cells import Cell
from kernelnorm.experiments.report.collect import Unreadable
from kernelnorm.experiments.report.leaderboard_table import leaderboard_table
from kernelnorm.experiments.report.sections import Section
from kernelnorm.experiments.style import LABELS

__all__ = ["section_tables", "unreadable_table"]


def section_tables(section: Section) -> dict[str, Table]:
    """Return the tables that have rows, by name."""
    tables = {
        "accuracy": _accuracy(section),
        "leaderboard": leaderboard_table(section.standings),
        "comparison": _comparison(section),
        "time": _time(section),
        "lr": _lr(section),
        "rates": _rates(section),
        "variants": _variants(section),
        "incomplete": _incomplete(section),
        "missing": _missing(section),
    }
    return {name: table for name, table in tables.items() if table.rows}


def unreadable_table(unreadable: Sequence[Unreadable]) -> Table:
    """Return the table of the folders that the report leaves out."""
    rows = [[Entry(item.folder), Entry(item.reason)] for item in unreadable]
    note = "Their numbers are in no table and no figure."
    return Table(
        "Folders that cannot be read, or hold a run that is counted already",
        ["folder", "why"],
        rows,
        note,
    )


def _accuracy(section: Section) -> Table:
    note = (
        "Final test accuracy in %: mean ± sample deviation over seeds, each the mean over its "
        "last five epochs, never the best epoch. If fewer than three seeds count, the cell gives "
        "their number. Seed 0 chooses the learning rate (Table 4), and then the other seeds count; "
        f"seed 0 counts if there are no others, or if a single rate was tried.{_untuned(section)}"
    )
    if section.config.case in paper():
        note += " Second line: the paper's value (three seeds), and (ours minus the paper's)."
    return _grid(section, "Table 1. Test accuracy", note, _accuracy_entry)


def _accuracy_entry(section: Section, cell: Cell) -> Entry:
    theirs = paper_accuracy(section.config.case, cell.norm, cell.batch_size)
    printed = f"paper {theirs[0]:.2f} ± {theirs[1]:.2f}" if theirs else ""
    ours = cell.accuracy
    if ours is None:
        return Entry(cell.absence, None, printed)
    counts = [f"{ours.runs} run{'s' * (ours.runs > 1)}"] if ours.runs < 3 else []
    counts += [f"{cell.diverged} diverged"] if cell.diverged else []
    text = estimate_text(ours) + (f" ({', '.join(counts)})" if counts else "")
    if theirs:
        printed += f" ({signed(ours.mean - theirs[0])})"
    return Entry(text, ours.mean, printed)


def _comparison(section: Section) -> Table:
    head = ["batch size", "KernelNorm − BatchNorm", "95 % interval", "pairs"]
    in_paper = section.config.case in paper()
    rows = []
    for comparison in section.comparisons:
        found = comparison.difference
        row = [
            number_entry(comparison.batch_size),
            Entry(signed(found.mean), found.mean) if found else Entry("no pair"),
            interval_entry(found),
            number_entry(found.pairs if found else 0),
        ]
        if in_paper:
            theirs = comparison.paper
            row.append(Entry("-") if theirs is None else Entry(signed(theirs), theirs))
        rows.append(row)
    note = (
        "Percentage points of final accuracy, KernelNorm minus BatchNorm, paired by seed; only "
        "seeds that both norms have count. The interval is Student's, for the mean of the pairs, "
        "and needs two pairs. It holds for one row: one in twenty intervals misses the true value."
    )
    title = "Kernel against batch normalisation"
    return Table(title, [*head, *(["paper's difference"] if in_paper else [])], rows, note)


def _time(section: Section) -> Table:
    case = section.config.case
    in_paper = case in paper()
    rows = []
    for cell in section.cells.values():
        batch = section.cells.get(("batch", cell.batch_size))
        row = [number_entry(cell.batch_size), Entry(LABELS[cell.norm])]
        for name in ("seconds_per_epoch", "minutes"):
            ours = getattr(cell, name)
            row.append(Entry("-") if ours is None else Entry(f"{ours:.2f}", ours))
            row.append(ratio_entry(ours, getattr(batch, name) if batch else None))
            if in_paper:
                there = (case, cell.norm, cell.batch_size)
                norms = (there, (case, "batch", cell.batch_size))
                row.append(ratio_entry(*(paper_time(name, *place) for place in norms)))
        if cell.accuracy:
            rows.append(row)
    columns = ["ratio", *(["paper's ratio"] if in_paper else [])]
    head = ["batch size", "norm", "s per epoch", *columns, "minutes", *columns]
    note = (
        "Median over epochs and runs of the training's seconds per epoch, and median over runs of "
        "its whole time, without test passes; ratios to BatchNorm. If other work ran on the "
        "machine at the same time, times and ratios differ from those of an idle machine."
    )
    if in_paper:
        note += " The paper's Table 2 is for batch size 32, on an RTX A6000."
    if len(section.environments) > 1:
        note += " The runs used different devices, threads or versions."
    return Table("Table 2. Training time", head, rows, note)


def _lr(section: Section) -> Table:
    note = f"The rate with the best final accuracy of seed 0.{_untuned(section)}"
    if any(cell.edge for cell in section.cells.values()):
        note += " If it is the lowest or highest one tried, a rate beyond it may be better."
    if section.config.case in paper():
        note += " Second line: the paper's rate."
    return _grid(section, "Table 4. Best learning rate", note, _lr_entry)


def _lr_entry(section: Section, cell: Cell) -> Entry:
    theirs = paper_lr(section.config.case, cell.norm, cell.batch_size)
    printed = f"paper {theirs:g}" if theirs else ""
    if cell.lr is None:
        return Entry(cell.absence, None, printed)
    alone = " (the only one tried)" if len(cell.rates) == 1 else ""
    edge = f" (the {cell.edge} tried)" if cell.edge else alone
    return Entry(f"{cell.lr:g}{edge}", cell.lr, printed)


def _untuned(section: Section) -> str:
    """Return a sentence on the cells whose learning rate the reported seeds chose, if any."""
    cells = [
        f"{LABELS[cell.norm]} at batch size {cell.batch_size}"
        for cell in section.cells.values()
        if cell.reported_chose
    ]
    if not cells:
        return ""
    return (
        " Where seed 0 has no result at one of the rates, the mean over all seeds chooses, and "
        f"the reported accuracy is too high on average: {', '.join(cells)}."
    )


def _rates(section: Section) -> Table:
    head = ["batch size", "norm", "learning rate", "tuning, %", "all seeds, %", "runs", "chosen"]
    rows = [
        [
            number_entry(cell.batch_size),
            Entry(LABELS[cell.norm]),
            Entry(f"{rate.lr:g}", rate.lr),
            Entry("-") if rate.tuning is None else Entry(f"{rate.tuning:.2f}", rate.tuning),
            estimate_entry(rate.accuracy),
            Entry(states_text(rate.states)),
            Entry("best" if rate.lr == cell.lr else ""),
        ]
        for cell in section.cells.values()
        for rate in cell.rates
    ]
    if all(len(cell.rates) < 2 for cell in section.cells.values()):
        rows = []  # nothing was tuned
    note = (
        "Tuning: the final accuracy of seed 0, by which the best rate is chosen (the mean over all "
        "seeds, if seed 0 has no result at a rate); a rate at which such a run diverged is the "
        "worst. All seeds: mean ± sample deviation, including seed 0."
    )
    return Table("Every learning rate that was tried", head, rows, note, folded=True)


def _variants(section: Section) -> Table:
    head = ["batch size", "learning rate", "rules", "accuracy, %", "runs"]
    head += ["to the paper's rules", "95 % interval", "pairs"]
    rows = []
    for variant in section.variants:
        found = variant.to_paper
        rows.append(
            [
                number_entry(variant.batch_size),
                Entry(f"{variant.lr:g}", variant.lr),
                Entry(variant.label),
                estimate_entry(variant.accuracy),
                Entry(states_text(variant.states)),
                Entry(signed(found.mean), found.mean) if found else Entry("-"),
                interval_entry(found) if found else Entry("-"),
                number_entry(found.pairs) if found else Entry("-"),
            ]
        )
    note = (
        "Kernel networks with changed rules: mean ± sample deviation over all seeds, and the "
        "difference to the paper's rules in percentage points, paired by seed, at the same "
        "learning rate, with Student's interval."
    )
    return Table("Ablations", head, rows, note)


def _incomplete(section: Section) -> Table:
    head = ["norm", "batch size", "learning rate", "seed", "state", "message"]
    rows = []
    for record in section.records:
        config, epochs = record.config, len(record.history)
        if record.state == "done":
            continue
        said = record.message or f"{epochs} of at most {config.epochs} epochs"
        rows.append(
            [
                Entry(LABELS[config.norm], None, config.variant),
                number_entry(config.batch_size),
                Entry(f"{config.lr:g}", config.lr),
                number_entry(config.seed),
                Entry(record.state),
                Entry(said, None, record.folder),
            ]
        )
    note = (
        "These runs are in no mean. A diverged run is a result. To continue failed and unfinished "
        "runs, run the same command again."
    )
    return Table("Runs that are not done", head, rows, note)


def _missing(section: Section) -> Table:
    rows = [[Entry(LABELS[cell.norm]), number_entry(cell.batch_size)] for cell in section.missing]
    note = "There is no run with these combinations of normalisation and batch size."
    return Table("Missing", ["norm", "batch size"], rows, note)


def _grid(
    section: Section, title: str, note: str, entry: Callable[[Section, Cell], Entry]
) -> Table:
    """Return the table in the paper's form: a row for each batch size, a column for each norm."""
    rows = [
        [
            number_entry(batch_size),
            *(entry(section, section.cells[norm, batch_size]) for norm in section.norms),
        ]
        for batch_size in section.batch_sizes
    ]
    return Table(title, ["batch size", *(LABELS[norm] for norm in section.norms)], rows, note)
