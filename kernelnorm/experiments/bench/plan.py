"""What the bench measures: the rows of the table, and the settings that all rows share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product

import torch

from kernelnorm.experiments.errors import RunError, to_install
from kernelnorm.experiments.style import LABELS, network_label
from kernelnorm.models import list_models
from kernelnorm.norms import NORMS

__all__ = ["CASE_STUDIES", "Case", "Plan", "Row", "make_plan"]

CASE_STUDIES = {"vgg8": 32, "resnet18": 192, "densenet121": 160}
"""The networks of the paper's case studies, and their images' height and width."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MODES = ("eager", "compile", "reduce-overhead")
PASSES = ("train", "inference")
WAYS = ("bookkeeping", "hooks", "ghost")
"""Ways to compute clipped gradients: each a ``grad_sample_mode`` of the private engine."""

_SIZES = CASE_STUDIES | {"knresnet13": 32}


@dataclass(frozen=True)
class Case:
    """A network and its input."""

    network: str
    image_size: int
    batch_size: int

    def __str__(self) -> str:
        size = self.image_size
        return f"{network_label(self.network)}, {size}×{size}, batch {self.batch_size}"


@dataclass(frozen=True)
class Column:
    """What is measured in each row: a norm, trained as usual or privately.

    Args:
        norm: one of :data:`kernelnorm.norms.NORMS`.
        way: one of :data:`WAYS`, or an empty string for the ordinary step.
    """

    norm: str
    way: str = ""

    def __str__(self) -> str:
        return f"{self.norm}_{self.way}" if self.way else self.norm

    @property
    def label(self) -> str:
        """The column's name in tables and figures."""
        return f"{LABELS[self.norm]}, {self.way}" if self.way else LABELS[self.norm]


BATCH, NONE = Column("batch"), Column("none")

_QUICK = (
    Case("vgg8", 32, 2),
    Case("vgg8", 32, 32),
    Case("resnet18", 96, 4),
    Case("densenet121", 64, 4),
)
_QUICK_PRIVATE = Case("vgg8", 32, 16), Case("knresnet13", 32, 16)


@dataclass(frozen=True)
class Row:
    """One row of the table; its columns and memory formats are measured in turn.

    Args:
        case: the network and its input.
        dtype: one of :data:`DTYPES`; the half-precision ones by autocast.
        mode: one of :data:`MODES`.
        pass_: one of :data:`PASSES`: forward, backward and SGD with momentum, or forward alone;
            or ``"private"``: a training step in which some columns clip the samples' gradients.
    """

    case: Case
    dtype: str
    mode: str
    pass_: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; :func:`make_plan` makes a plan from the command's options.

    Args:
        rows: the rows, in the order in which they are measured.
        columns: what is measured in each row.
        bases: the two columns that ratios refer to: the first in the tables of times and memory,
            the second in another table of times, if it is measured.
        memory_formats: the memory formats in which each column is measured.
        device: the CPU, or a GPU.
        threads: PyTorch's CPU threads; ``None`` leaves the setting unchanged.
        rounds: the maximum number of rounds of a row; a round measures every variant once.
        seconds: the time limit of a row; three rounds are measured in any case, if ``rounds``
            allows them.
    """

    rows: Sequence[Row]
    columns: Sequence[Column]
    bases: tuple[Column, Column]
    memory_formats: Sequence[str]
    device: torch.device
    threads: int | None
    rounds: int
    seconds: float


def make_plan(
    *,
    networks: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    norms: Sequence[str] | None = None,
    passes: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32",),
    memory_formats: Sequence[str] = ("channels_last",),
    modes: Sequence[str] = ("eager",),
    device: str = "auto",
    threads: int | None = None,
    rounds: int = 15,
    seconds: float = 20.0,
    quick: bool = False,
    private: bool = False,
) -> Plan:
    """Return a plan from the options that ``kernelnorm bench --help`` explains.

    Raises:
        RunError: an option has an invalid value, or two options exclude each other.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch finds no CUDA device here")
    if private:
        _check_private(norms=norms, passes=passes, modes=modes)
        columns = [Column(norm, way) for norm in ("kernel", "group") for way in ("", *WAYS)]
        bases, passes = (Column("kernel"), Column("group", "hooks")), ["private"]
    else:
        norms = ["none", "batch", "group", "layer", "kernel"] if norms is None else norms
        passes = PASSES if passes is None else passes
        _check_names("--norms", norms, NORMS)
        if "batch" not in norms:
            raise RunError(
                f"--norms must include batch, as times are ratios to it, got {','.join(norms)}"
            )
        _check_names("--passes", passes, PASSES)
        columns, bases = [Column(norm) for norm in norms], (BATCH, NONE)
    _check_names("--dtypes", dtypes, DTYPES)
    _check_names("--memory-formats", memory_formats, MEMORY_FORMATS)
    _check_names("--modes", modes, MODES)
    for option, value in (("--dtypes", "float16"), ("--modes", "reduce-overhead")):
        if value in (*dtypes, *modes) and not cuda:
            raise RunError(f"{option} {value} needs a CUDA device, got --device {device}")
    if threads is not None:
        _check_least("--threads", threads, 1)
    _check_least("--rounds", rounds, 2)
    _check_least("--seconds", seconds, 0)
    given = {"--networks": networks, "--sizes": sizes, "--batch-sizes": batch_sizes}
    if quick:
        if clash := [option for option, values in given.items() if values is not None]:
            raise RunError(f"--quick has its own cases: leave out --quick, or {', '.join(clash)}")
        cases: Sequence[Case] = _QUICK_PRIVATE if private else _QUICK
        rounds, seconds = min(rounds, 9), min(seconds, 4.0)
    elif private:
        cases = _cases(networks or ["vgg8", "knresnet13"], sizes, batch_sizes or [64], private)
    else:
        cases = _cases(networks or [*CASE_STUDIES], sizes, batch_sizes or [2, 32], private)
    return Plan(
        rows=[Row(*choices) for choices in product(cases, dtypes, modes, passes)],
        columns=columns,
        bases=bases,
        memory_formats=memory_formats,
        device=torch.device(device),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
    )


def _check_private(
    *, norms: Sequence[str] | None, passes: Sequence[str] | None, modes: Sequence[str]
) -> None:
    """Raise :class:`RunError` for options that ``--private`` sets itself, and without Opacus."""
    for option, values in (("--norms", norms), ("--passes", passes)):
        if values is not None:
            raise RunError(f"--private has its own {option[2:]}: leave out --private, or {option}")
    if [*modes] != ["eager"]:
        raise RunError(f"--private needs --modes eager, got {','.join(modes)}")
    if find_spec("opacus") is None:
        raise RunError(f"--private needs: {to_install('private')}")


def _cases(
    networks: Sequence[str], sizes: Sequence[int] | None, batch_sizes: Sequence[int], private: bool
) -> list[Case]:
    _check_names("--networks", networks, list_models())
    for network in networks:
        if network not in list_models("batch") and not private:
            raise RunError(
                f"--networks: {network} exists with the norm kernel only, and bench compares "
                f"norms; choose from: {', '.join(list_models('batch'))}"
            )
    if sizes is None:
        sizes = [_size_of_family(network) for network in networks]
    if len(sizes) != len(networks):
        raise RunError(
            f"--sizes must have a number for each of the {len(networks)} networks "
            f"({','.join(networks)}), got {','.join(map(str, sizes))}"
        )
    for size in sizes:
        _check_least("--sizes", size, 1)
    for batch_size in batch_sizes:
        _check_least("--batch-sizes", batch_size, 1)
    return [
        Case(network, size, batch_size)
        for network, size in zip(networks, sizes, strict=True)
        for batch_size in batch_sizes
    ]


def _size_of_family(network: str) -> int:
    """Return the network's image size, else that of its family's case study, else ResNet-18's."""
    if network in _SIZES:
        return _SIZES[network]
    family = network.rstrip("0123456789")
    sizes = (size for study, size in CASE_STUDIES.items() if study.startswith(family))
    return next(sizes, CASE_STUDIES["resnet18"])


def _check_names(option: str, values: Sequence[str], known: Collection[str]) -> None:
    if not values:
        raise RunError(f"{option} is empty, choose from: {', '.join(known)}")
    for value in values:
        if value not in known:
            raise RunError(f"{option}: unknown {value!r}, choose from: {', '.join(known)}")
    if len({*values}) < len(values):
        raise RunError(f"{option} must have each name once, got {','.join(values)}")


def _check_least(option: str, value: float, least: float) -> None:
    if value < least:
        raise RunError(f"{option} must be at least {least}, got {value}")
