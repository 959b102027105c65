"""The report's figures, drawn."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from kernelnorm.experiments.plotting import curves, legend, png, same_span
from kernelnorm.experiments.report import figures, report
from kernelnorm.experiments.style import line_style
from kernelnorm.norms import NORMS
from tests.run_folders import write_result, write_run


def test_figures_are_pictures_and_the_markdown_shows_them(tmp_path: Path) -> None:
    for norm in ("batch", "kernel"):
        for batch_size in (2, 32):
            for lr in (0.01, 0.02):
                options = {"norm": norm, "batch_size": batch_size, "lr": lr, "seed": 0}
                write_result(tmp_path, 80.0 + batch_size / 8, **options)
    for p in (0.0, 0.2):
        write_result(tmp_path, 80.0, seed=0, model_options={"rules": {"dropout_p": p}})
    write_result(tmp_path, 80.0, seed=0, model_options={"rules": {"head": False}})
    page = report(tmp_path)
    text = page.with_suffix(".md").read_text()
    names = ("figure-3", "figure-4", "learning-rates", "figure-5", "ablations")
    assert {file.stem for file in page.parent.glob("*.png")} == {f"cifar10-vgg8-{n}" for n in names}
    for file in page.parent.glob("*.png"):
        assert f"]({file.name})" in text
        with Image.open(BytesIO(file.read_bytes())) as picture:
            assert picture.width > 700
            colors = picture.convert("RGB").getcolors(2**24)
            assert colors is not None
            assert len(colors) > 50  # lines are drawn


def test_curves_are_the_mean_of_the_seeds_with_a_band() -> None:
    axes = Figure().subplots()
    curves(axes, [[1.0, 2.0, 3.0], [3.0, 8.0]], line_style("batch"))
    (line,), (band,) = axes.get_lines(), axes.collections
    assert [*line.get_xdata()] == [1, 2]
    assert [*line.get_ydata()] == [2.0, 5.0]
    box = band.get_datalim(axes.transData)
    assert (box.y0, box.y1) == (1.0, 8.0)
    alone = Figure().subplots()
    curves(alone, [[1.0, 2.0]], line_style("batch"))
    assert not alone.collections


def test_the_dashed_line_is_at_the_end_of_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
    write_run(tmp_path, [50.0] * 10, seed=1, epochs=20, losses=[1.0] * 5 + [1e-4] * 5)  # converged
    write_run(tmp_path, [60.0] * 20, seed=2, epochs=20)
    text = report(tmp_path).with_suffix(".md").read_text()
    curve, dashed = drawn[0].axes[1].lines
    assert [curve.get_xdata()[-1], *dashed.get_xdata()] == [10, 5.7, 10.3]
    assert "A curve ends with its shortest seed." in text


def test_axes_of_the_same_span() -> None:
    panels = Figure().subplots(1, 3)
    for panel, limits in zip(panels, ((20.0, 56.0), (83.0, 86.0), (40.0, 44.0)), strict=True):
        panel.set_ylim(*limits)
    same_span(panels)
    assert [panel.get_ylim() for panel in panels] == [(20, 56), (64, 100), (24, 60)]


@pytest.mark.parametrize("norms", [("batch", "group", "layer", "kernel"), NORMS])
def test_legends_are_within_their_figures(norms: tuple[str, ...]) -> None:
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for norm in norms:
        axes.plot([0, 1], [0, 1], **line_style(norm))
    legend(figure, [axes])
    png(figure)
    (drawn,) = figure.legends
    box = drawn.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
