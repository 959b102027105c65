"""What is imported when: ``import kernelnorm`` and the command line's help import no PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import kernelnorm as kn

ROOT = Path(__file__).parent.parent
HELP = """
import contextlib, io, sys

def check(what):
    heavy = {"torch", "numpy", "matplotlib", "lightning_fabric"} & {*sys.modules}
    assert not heavy, (what, heavy)

import kernelnorm
from kernelnorm.cli import COMMANDS, main

dir(kernelnorm)
check("import")
for command in ([], *([name] for name in COMMANDS)):
    for argument in ("--help", "--no-such-option"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main([*command, argument])
            except SystemExit as error:
                assert error.code == (0 if argument == "--help" else 2)
        check([*command, argument])
"""
FIRST_USES = """
import os, sys
import torch
import kernelnorm as kn

x, expected = torch.load("tensors.pt")

def unpickled():
    return torch.load("network.pt", weights_only=False)(x)

def graph():
    import kernelnorm.functional  # registers the operators
    return torch.load("graph.pt", weights_only=False)(x)

def compiled():
    weight, bias = torch.load("weights.pt")
    def layer(x):
        return kn.functional.kn_conv(x, weight, bias, training=False)
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)

def operators():
    kn.KNConv2d
    torch.ops.kernelnorm.kn_conv_backward.default
    return expected

for use in (unpickled, graph, compiled, operators):
    assert "kernelnorm.functional" not in sys.modules
    if os.fork() == 0:
        torch.testing.assert_close(use(), expected)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, use
"""


def run(code: str, folder: Path) -> None:
    """Run code in a process that has imported nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_help_and_mistakes_import_no_pytorch(tmp_path: Path) -> None:
    run(HELP, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about pickled graphs
def test_the_first_use_of_the_package_may_be_any(tmp_path: Path) -> None:
    """Each registers what it needs, in a process that has used nothing before."""
    network = kn.KNConv2d(3, 4, 3).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.save((x, network(x).detach()), tmp_path / "tensors.pt")
    torch.save((network.weight.data, network.bias.data), tmp_path / "weights.pt")
    torch.save(network, tmp_path / "network.pt")
    graph = make_fx(network)(x)
    assert "torch.ops.kernelnorm.kn_conv.default" in graph.code
    torch.save(graph, tmp_path / "graph.pt")
    run(FIRST_USES, tmp_path)


def test_public_names() -> None:
    assert dir(kn) == sorted([*kn.__all__, "__version__"])
    for name in kn.__all__:
        assert getattr(kn, name) is not None
    assert kn.KNConv2d.__module__ == "kernelnorm.modules"
    assert isinstance(kn.KNConv2d(3, 4, 3), nn.Conv2d)
    assert callable(kn.convert)


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    code = """if True:
        import sys
        import kernelnorm as kn

        sys.modules["PIL"] = None
        kn.KNConv2d
        try:
            kn.load
        except ModuleNotFoundError as error:
            assert str(error) == "kernelnorm.load needs PIL: pip install '.[experiments]'"
        else:
            raise AssertionError
    """
    run(code, tmp_path)


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="module 'kernelnorm' has no attribute 'KNConv4d'"):
        kn.KNConv4d  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'KNConv4d'"):
        from kernelnorm import KNConv4d  # noqa: F401
