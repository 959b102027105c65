"""Run folders written by hand, and what a report says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.report import report
from kernelnorm.experiments.runs import RunFolder

ENVIRONMENT = {"kernelnorm": "0.1.0", "torch": "2.13.0", "device": "cpu: x86_64", "processes": 1}


def write_run(
    root: Path,
    accuracies: Sequence[float],
    *,
    norm: str = "kernel",
    batch_size: int = 32,
    lr: float = 0.01,
    seed: int = 1,
    epochs: int = 6,
    seconds: float = 2.0,
    failure: tuple[str, str] | None = None,
    case: str = "cifar10-vgg8",
    losses: Sequence[float] | None = None,
    images_per_second: float | None = 1.0,
    found: dict[str, Any] | None = None,
    **choices: Any,
) -> RunConfig:
    """Write a run with these test accuracies, in percent, one for each epoch.

    Without ``losses``, the training loss of an epoch is 2 divided by its number.
    """
    config = configure(
        recipe_for(case),
        norm=norm,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        epochs=epochs,
        **choices,
    )
    folder = RunFolder(root / config.name)
    folder.write_config({"run": config.as_dict(), "environment": ENVIRONMENT, **(found or {})})
    speed = {} if images_per_second is None else {"images_per_second": images_per_second}
    folder.write_metrics(
        [
            {
                "epoch": epoch,
                "train_loss": losses[epoch - 1] if losses else 2.0 / epoch,
                "train_accuracy": accuracy / 100,
                "test_loss": 1.0,
                "test_accuracy": accuracy / 100,
                "lr": lr,
                "seconds": seconds,
                **speed,
            }
            for epoch, accuracy in enumerate(accuracies, 1)
        ]
    )
    if failure:
        record = {"kind": failure[0], "message": failure[1]}
        (folder.path / "failure.json").write_text(json.dumps(record))
    return config


def write_result(root: Path, accuracy: float, **options: Any) -> RunConfig:
    """Write a run that is done, and whose final accuracy, in percent, is known.

    Its best epoch is the first, and a better one: whoever took that would show another number.
    """
    last_five = [accuracy + change for change in (-2, 2, 0, 1, -1)]
    return write_run(root, [accuracy + 9, *last_five], **options)


def numbers_of(root: Path) -> dict[str, Any]:
    """The numbers of the report, read again."""
    page = report(root)
    numbers: dict[str, Any] = json.loads(page.with_name("report.json").read_text())
    return numbers


def cell_of(numbers: dict[str, Any], norm: str, batch_size: int) -> dict[str, Any]:
    (section,) = numbers["sections"]
    (cell,) = (c for c in section["cells"] if (c["norm"], c["batch_size"]) == (norm, batch_size))
    return dict(cell)


def row_of(text: str, *starts: str) -> list[str]:
    """The cells of the first row of a Markdown table that begins with these cells."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return next(row for row in rows if row[: len(starts)] == [*starts])
