"""The benchmark of the data path runs, and prints a line for each batch size."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "data_path.py"


def test_data_path(monkeypatch, capsys):
    options = ["--batch-sizes", "2", "32", "--seconds", "0.01", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "digits", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    _, heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.startswith("data set")
    assert len(lines) == 2
    for line, expected in zip(lines, ("2", "32"), strict=True):
        name, shape, _, batch_size, *speeds = line.split()
        assert (name, shape, batch_size) == ("digits", "1x8x8", expected)
        assert all(float(speed.replace(",", "")) > 0 for speed in speeds)
