"""``kernelnorm info``: versions, devices and folders, for bug reports.

If the value of a line cannot be determined, the line shows the error, and the other lines are
printed as usual: for example, if PyTorch cannot be imported.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import kernelnorm
from kernelnorm.cli.options import command_parser
from kernelnorm.experiments.machine import cpu_name, describe_cpu, user_cache

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_PACKAGES = (
    *("numpy", "scipy", "lightning-fabric", "jsonargparse", "matplotlib", "pillow"),
    *("triton", "opacus", "timm", "torchvision", "ray", "safetensors", "huggingface_hub", "onnx"),
)
_FEATURES = (
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2"),
)
"""Instruction sets that PyTorch and the C kernels have code for, as Linux names them."""


def make_parser() -> ArgumentParser:
    """Return the parser of the command's arguments, of which there are none."""
    return command_parser(
        "Print versions, devices and folders. Put them into a bug report.", "kernelnorm info"
    )


def run(arguments: Namespace | None = None) -> None:
    """Run the command."""
    probes = {
        "kernelnorm": _kernelnorm,
        "Python": _python,
        "platform": platform.platform,
        "PyTorch": _pytorch,
        "packages": _packages,
        "missing": _missing,
        "CPU": _cpu,
        "threads": _threads,
        "C kernels": _c_kernels,
        "backends": _backends,
        "CUDA": _cuda,
        "data": _data,
        "cache": _cache,
    }
    for name, probe in probes.items():
        try:
            text = probe()
        except Exception as error:  # whatever is wrong here, the report shows it
            text = f"unknown, {type(error).__name__}: {error}"
        print(f"{name:12}{text.strip()}".replace("\n", f"\n{'':12}"))


def _kernelnorm() -> str:
    return f"{kernelnorm.__version__}, {Path(kernelnorm.__file__).parent}"


def _python() -> str:
    return f"{platform.python_version()}, {sys.executable}"


def _pytorch() -> str:
    import torch

    return f"{torch.__version__}, uses {torch.backends.cpu.get_cpu_capability()} on CPUs"


def _versions() -> dict[str, str]:
    """Return the versions of the optional packages, empty for those that are not installed."""
    versions = dict.fromkeys(_PACKAGES, "")
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _packages() -> str:
    return ", ".join(f"{name} {found}" for name, found in _versions().items() if found) or "none"


def _missing() -> str:
    return ", ".join(name for name, found in _versions().items() if not found) or "none"


def _cpu() -> str:
    described = describe_cpu()
    flags = (described.get("flags") or described.get("Features") or "").split()
    return f"{cpu_name()}\n{' '.join(feature for feature in _FEATURES if feature in flags)}"


def _threads() -> str:
    import torch

    cores = f"{os.cpu_count()} cores"
    if sys.platform == "linux":
        cores += f", {len(os.sched_getaffinity(0))} for this process"
    limit = os.environ.get("OMP_NUM_THREADS", "not set")
    return f"{torch.get_num_threads()} of PyTorch; {cores}; OMP_NUM_THREADS: {limit}"


def _c_kernels() -> str:
    from kernelnorm.ops.backends.cpu.library import PATH, load

    if not PATH.exists():
        return f"not compiled: no C compiler worked at installation, so there is no {PATH}"
    try:
        load(PATH)
    except (OSError, AttributeError) as error:
        return f"compiled, but cannot be loaded: {error}"
    return f"compiled, {PATH}"


def _backends() -> str:
    """Return the backend of each device and dtype."""
    import torch

    devices = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    lines = []
    for device in devices:
        dtypes: dict[str, list[str]] = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            try:
                used = kernelnorm.backend(torch.empty(1, 1, 1, 1, dtype=dtype, device=device))
            except TypeError:  # MPS has no float64
                used = "none"
            dtypes.setdefault(used, []).append(str(dtype).removeprefix("torch."))
        shares = "; ".join(f"{used} for {', '.join(names)}" for used, names in dtypes.items())
        lines.append(f"on {device}: {shares}")
    return "\n".join(lines)


def _cuda() -> str:
    import torch

    toolkit = f"PyTorch is built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        return f"no device; {toolkit}"
    lines = [f"{toolkit}; cuDNN {torch.backends.cudnn.version()}"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"compute capability {device.major}.{device.minor}"
        lines.append(f"{i}: {device.name}, {capability}, {device.total_memory / 2**30:.0f} GiB")
    return "\n".join(lines)


def _data() -> str:
    return _folder(Path("data"))


def _cache() -> str:
    """Return the user's cache folder, which is used if the data folder is read-only."""
    return _folder(user_cache())


def _folder(folder: Path) -> str:
    return f"{folder.absolute()}{'' if folder.is_dir() else ', does not exist yet'}"
