"""Functions of tensors, compiled into loops over them.

``torch.compile`` guards what it has compiled: at each call it checks in Python whether it fits. For
a few microseconds of work that takes longer than the work. Here a function is traced once, for all
sizes, and Inductor's code for it is called as it is; that it fits is up to the caller. What it was
traced for is the number, the dtypes and the strides of its arguments.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_one_at_a_time = threading.Lock()
"""Tracing changes PyTorch itself while it runs, for all threads."""

_OPTIONS = {
    "size_asserts": False,
    "cpp.dynamic_threads": True,
    "cpp.threads": 16,  # so that loops on disk do not depend on how many threads were there first
    # Inductor would keep an intermediate result in memory where it takes many operations or reads,
    # and read it once more. Here loops are bound by memory, and `once` says what is kept.
    "realize_opcount_threshold": sys.maxsize,
    "realize_reads_threshold": sys.maxsize,
}

_tracing = threading.local()
""":func:`once` has its results in ``kept``, where this thread is tracing."""


def once(x: Tensor) -> Tensor:
    """Marks an intermediate result that is to be computed once, and kept for its uses.

    Whatever is not marked becomes a part of each loop that uses it.
    """
    kept: list[Tensor] | None = getattr(_tracing, "kept", None)
    if kept is not None:
        kept.append(x)
    return x


def in_halves(x: Tensor) -> Tensor:
    """The same 32-bit integers, computed once and kept in a form that compiled loops read fast.

    With AVX2 Inductor's loads of integers pass through the stack, where a wide load waits for the
    two narrow stores before it: some forty cycles each. Those of floats do not, and either half of
    an integer is exact in one.
    """
    if getattr(_tracing, "kept", None) is None or not _integers_load_slowly():
        return x
    high = once(x.bitwise_and(-0x10000).to(torch.float32))
    low = once(x.bitwise_and(0xFFFF).to(torch.float32))
    return high.to(torch.int32).bitwise_or(low.to(torch.int32))


def _integers_load_slowly() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def compile_for_all_sizes(
    function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor]
) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """The function as one compiled piece, to be called with a list of tensors like the examples.

    Args:
        function: of tensors; it may change them in place, and must not depend on their values
        examples: arguments whose sizes differ wherever those of a call may differ; a stride of
            theirs has to follow from the sizes in the way that it does in each call
    """
    from torch._dynamo import config as dynamo_config
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def with_kept(*tensors: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        _tracing.kept = kept
        try:
            return *function(*tensors), *kept
        finally:
            del _tracing.kept

    functional = torch.func.functionalize(with_kept, remove="mutations")
    separate = [_empty_like(example) for example in examples]
    # A cache of what operations return takes longer here than the operations.
    without_cache = dynamo_config.patch(fake_tensor_cache_enabled=False)
    with _one_at_a_time, torch.no_grad(), without_cache:
        trace = make_fx(functional, select_decomp_table(), tracing_mode="symbolic")(*separate)
        trace.shape_env = None  # Inductor looks at the inputs for it, and would not cache with it
        inputs = [node.meta["val"] for node in trace.graph.nodes if node.op == "placeholder"]
        with (
            tracing(TracingContext(inputs[0].fake_mode)),
            config.patch(_OPTIONS),
        ):
            compiled: Any = compile_fx_inner(trace, inputs)
    call: Callable[[list[Tensor]], tuple[Tensor, ...]] = compiled
    return call


def _empty_like(x: Tensor) -> Tensor:
    """A tensor with the same strides; it shares no memory with others."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
