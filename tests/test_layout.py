"""The way of data is downwards: a file imports from files above it in this list, never below."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kernelnorm"
ORDER = [
    "kernelnorm.reference",
    "kernelnorm.ops.regions",
    "kernelnorm.ops.windows",
    "kernelnorm.ops.layouts",
    "kernelnorm.ops.few_windows",
    "kernelnorm.ops.pointwise",
    "kernelnorm.ops.mask",
    "kernelnorm.ops.rows_torch",
    "kernelnorm.ops.statistics",
    "kernelnorm.ops.rows_compiled",
    "kernelnorm.ops.triton_kernels",
    "kernelnorm.ops.rows_triton",
    "kernelnorm.ops",
    "kernelnorm.ops.knconv",
    "kernelnorm.ops.dense",
    "kernelnorm.arguments",
    "kernelnorm.functional",
    "kernelnorm.modules",
    "kernelnorm.norms",
    "kernelnorm.models.blocks",
    "kernelnorm.models.vgg",
    "kernelnorm.models.resnet",
    "kernelnorm.models.densenet",
    "kernelnorm.models",
    "kernelnorm",
    "kernelnorm.experiments.data.images",
    "kernelnorm.experiments.data.disk",
    "kernelnorm.experiments.data.decode",
    "kernelnorm.experiments.data.download",
    "kernelnorm.experiments.data.load",
    "kernelnorm.experiments.data.batches",
    "kernelnorm.experiments.data",
    "kernelnorm.experiments",
    "kernelnorm.experiments.heap",
    "kernelnorm.experiments.runs",
    "kernelnorm.experiments.recipes",
    "kernelnorm.experiments.launch",
    "kernelnorm.experiments.evaluation",
    "kernelnorm.experiments.state",
    "kernelnorm.experiments.trainer",
    "kernelnorm.experiments.style",
    "kernelnorm.experiments.bench.plan",
    "kernelnorm.experiments.bench.results",
    "kernelnorm.experiments.bench.measure",
    "kernelnorm.experiments.bench.report",
    "kernelnorm.experiments.bench",
    "kernelnorm.experiments.compare",
    "kernelnorm.experiments.sweep.grid",
    "kernelnorm.experiments.sweep.tuning",
    "kernelnorm.experiments.sweep.plan",
    "kernelnorm.experiments.sweep.reproduction",
    "kernelnorm.experiments.sweep.status",
    "kernelnorm.experiments.sweep.view",
    "kernelnorm.experiments.sweep.execute",
    "kernelnorm.experiments.sweep.local",
    "kernelnorm.experiments.sweep.cluster",
    "kernelnorm.experiments.sweep",
    "kernelnorm.experiments.report.statistics",
    "kernelnorm.experiments.report.collect",
    "kernelnorm.experiments.report.reference",
    "kernelnorm.experiments.report.cells",
    "kernelnorm.experiments.report.variants",
    "kernelnorm.experiments.report.sections",
    "kernelnorm.experiments.report.entries",
    "kernelnorm.experiments.report.tables",
    "kernelnorm.experiments.report.plotting",
    "kernelnorm.experiments.report.variant_figures",
    "kernelnorm.experiments.report.figures",
    "kernelnorm.experiments.report.content",
    "kernelnorm.experiments.report.markdown",
    "kernelnorm.experiments.report.page",
    "kernelnorm.experiments.report",
    "kernelnorm.cli.options",
    "kernelnorm.cli.execution",
    "kernelnorm.cli.train",
    "kernelnorm.cli.compare",
    "kernelnorm.cli.sweep",
    "kernelnorm.cli.report",
    "kernelnorm.cli.reproduce",
    "kernelnorm.cli.evaluate",
    "kernelnorm.cli.predict",
    "kernelnorm.cli.bench",
    "kernelnorm.cli",
    "kernelnorm.__main__",
]
CORE = ORDER[: ORDER.index("kernelnorm.experiments.data.images")]


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports from, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & {*ORDER}
            names |= submodules or {str(node.module)}
    return names


FILES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def test_every_file_has_its_place():
    assert set(FILES) == set(ORDER)


def test_imports_point_upwards():
    for name, file in FILES.items():
        for imported in imports_of(file) & set(ORDER):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_the_core_needs_pytorch_and_nothing_else():
    for name in CORE:
        roots = {imported.split(".")[0] for imported in imports_of(FILES[name])}
        optional = {"triton"} if name == "kernelnorm.ops.triton_kernels" else set()
        assert roots - {*sys.stdlib_module_names} <= {"torch", "kernelnorm", *optional}, name
