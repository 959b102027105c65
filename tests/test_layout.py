"""The layers of the package: who may import whom, and who may use what of PyTorch.

The tree in docs/design.md is the order of the layers.
"""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHEN_ASKED_FOR = {
    ("kernelnorm", "kernelnorm.experiments.trained"),
    ("kernelnorm.bases", "kernelnorm.privacy.samplers"),  # when Opacus hooks a KNConv
}
"""Imports of rows below, inside functions, or of public names when they are first used."""
CORE = "kernelnorm"
"""The last row of the core, which needs PyTorch and nothing else."""


class File:
    """A file of the package and its imports."""

    def __init__(self, path: Path) -> None:
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.text = path.read_text()
        self.tree = ast.parse(self.text)


FILES = {file.name: file for file in map(File, sorted((ROOT / "kernelnorm").rglob("*.py")))}


def read_tree() -> dict[str, int]:
    """The modules in the tree of docs/design.md, each with the number of its row."""
    text = (ROOT / "docs" / "design.md").read_text()
    rows: dict[str, int] = {}
    parents: list[str] = []
    found = re.findall(r"^ {4}( {0,6})(\w+)(?:\.py|/)", text, re.MULTILINE)
    for number, (indent, name) in enumerate(found):
        parents[len(indent) // 2 :] = [name]
        rows[".".join(parents).removesuffix(".__init__")] = number
    return rows


ROWS = read_tree()


def row_of(name: str) -> int:
    """The row of a module, or of the package that holds it and has no rows within."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        row = ".".join(parts[:length])
        divided = any(other.startswith(f"{row}.") for other in ROWS)
        if row in ROWS and (row == name or not divided):
            return ROWS[row]
    raise AssertionError(f"{name} has no row in the tree of docs/design.md")


def imports_of(nodes: list[ast.AST]) -> set[str]:
    """The modules that import statements name: submodules, or what has the imported name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in FILES else str(node.module))
    return names


def all_imports(name: str) -> set[str]:
    """The imports of a file, inside functions too."""
    return imports_of([*ast.walk(FILES[name].tree)])


def first_imports(name: str) -> set[str]:
    """The imports of a file that happen when it is imported itself."""
    return imports_of([*FILES[name].tree.body])


def test_imports_are_from_the_same_row_or_rows_above():
    wrong = [
        f"{name} imports {imported}"
        for name in FILES
        for imported in all_imports(name) & {*FILES}
        if row_of(imported) > row_of(name) and (name, imported) not in WHEN_ASKED_FOR
    ]
    assert not wrong


def test_every_row_is_a_file_or_a_package():
    assert {*ROWS} <= {*FILES}


def test_no_file_imports_itself_through_others():
    """Imports inside functions may do so: ``backend_for`` loads the backends, which stand on it."""
    graph = {name: first_imports(name) & {*FILES} for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_core_needs_pytorch_and_nothing_else():
    for name in FILES:
        if row_of(name) > row_of(CORE):
            continue
        roots = {imported.split(".")[0] for imported in all_imports(name)}
        in_triton = name == "kernelnorm.ops.backends.triton.device_functions"
        optional = {"triton"} if in_triton else set()
        assert roots - {*sys.stdlib_module_names} <= {"torch", "kernelnorm", *optional}, name


PRIVATE = re.compile(
    r"\btorch(?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*"
    r"|\b_(?:version|ConvNd|conv_forward|(?:forward|backward)_(?:pre_)?hooks)\b"
)
"""Private names of PyTorch, which any of its versions may change."""


def private_names(text: str) -> set[str]:
    """The private names of PyTorch in a file."""
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
    return {*PRIVATE.findall("\n".join([text, *names]))}


def test_private_names_of_pytorch_are_in_one_file_and_documented():
    """Each is named in docs/design.md, with the reason."""
    design = (ROOT / "docs" / "design.md").read_text()
    allowed = {"kernelnorm.conversion.kinds": {"_conv_forward"}}
    for name, file in FILES.items():
        used = private_names(file.text)
        assert name == "kernelnorm.ops.observers" or used <= allowed.get(name, set()), name
        assert not [private for private in used if private not in design], name


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch._C._f(x)", {"torch._C._f"}),
        ("x._version", {"_version"}),
        ("class A(nn.modules.conv._ConvNd): pass", {"_ConvNd"}),
        ("module._forward_hooks", {"_forward_hooks"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch.utils import x, _pytree", {"torch.utils._pytree"}),
        ("from torch._ops import f", {"torch._ops", "torch._ops.f"}),
        ("torch.nn.f; torch.__version__; self._torch", set()),
    ],
)
def test_what_is_a_private_name_of_pytorch(code: str, expected: set[str]):
    assert private_names(code) == expected
