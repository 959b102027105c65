"""What ``test_trainer.py`` has two processes do; torchrun starts them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch, leave
from kernelnorm.experiments.trainer import train
from tests.small_runs import small


def main(out: Path) -> None:
    first = os.environ["RANK"] == "0"
    config = small("layer", lr=0.02)
    launch = Launch(accelerator="cpu", verbose=False, max_steps=12)
    train(config, replace(launch, out=out / "whole"))
    train(config, replace(launch, out=out / "paused", max_steps=5))
    train(config, replace(launch, out=out / "paused"))
    try:
        train(config, replace(launch, out=out / "whole" if first else out / "elsewhere"))
    except RunError as error:
        (out / f"error{os.environ['RANK']}").write_text(str(error))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
