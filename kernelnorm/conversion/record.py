"""Records one forward pass: the calls of layers and functions, and the tensors between them.

Hooks see the calls of layers, and a :class:`torch.overrides.TorchFunctionMode` sees the functions
that a network calls between them. The network runs as it is; nothing is traced into another form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernelnorm.ops import observers
from kernelnorm.ops.containers import tensors_in

__all__ = ["Call", "Value", "record"]


@dataclass(eq=False)
class Value:
    """A tensor as one call produced it; after a change in place the tensor has a new value."""

    maker: Call | None
    """The call that returned it; ``None`` for parameters and the input of the network."""
    shape: torch.Size
    storage: int
    """The same number for tensors that share memory."""
    users: list[Call] = field(default_factory=list)


@dataclass(eq=False)
class Call:
    """A call of a layer, or of a function outside of layers."""

    name: str
    """The qualified name of the layer, or the name of the function."""
    module: nn.Module | None
    owner: str
    """The qualified name of the module in whose ``forward`` it was called."""
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)
    """The storages of the inputs that the call changes in place, now or in training."""

    @property
    def end(self) -> bool:
        """True for the call that stands for the network's return: its inputs are the outputs."""
        return self.name == "return" and self.module is None


def record(
    network: nn.Module,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    is_layer: Callable[[nn.Module], bool],
) -> list[Call]:
    """Run the network once, in evaluation and without gradients, and return its calls in order.

    The last call is the network's return. Random number generators and the training modes of all
    modules are left as they were.

    Args:
        network: any module
        arguments, options: the arguments of its ``forward``
        is_layer: true for modules whose call is recorded as one call; the functions that these
            modules call are not recorded
    """
    training = {module: module.training for module in network.modules()}
    recorder = _Recorder()
    generators = torch.random.fork_rng(range(torch.cuda.device_count()))
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), generators, recorder.hooks(network, is_layer), recorder:
            output = network(*arguments, **options)
    finally:
        for module, mode in training.items():
            module.training = mode
    recorder.end(output)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._values: dict[int, tuple[Tensor, Value]] = {}  # tensors keep their ids taken
        self._running: list[tuple[Call, list[Tensor], list[int]]] = []
        self._owners = [""]
        self._at_work = False

    @contextmanager
    def hooks(self, network: nn.Module, is_layer: Callable[[nn.Module], bool]) -> Iterator[None]:
        handles = []
        for name, module in network.named_modules():
            enter, leave = (
                self._layer_hooks(name, module) if is_layer(module) else self._owner_hooks(name)
            )
            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self, output: Any) -> None:
        """Record what the network returned."""
        self._begin(Call("return", None, ""), (output,), {})
        self._end(output)

    def _layer_hooks(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            with self._own_work():
                self._begin(Call(name, module, self._owners[-1]), args, kwargs)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            with self._own_work():
                self._end(output)

        return enter, leave

    def _owner_hooks(self, name: str) -> tuple[Any, Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._owners.append(name)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self._owners.pop()

        return enter, leave

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """Keep the recorder's own function calls (such as a tensor's shape) out of the record."""
        self._at_work = True
        try:
            yield
        finally:
            self._at_work = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._running or self._at_work:
            return func(*args, **kwargs)
        call = Call(getattr(func, "__name__", ""), None, self._owners[-1])
        self._begin(call, args, kwargs)
        try:
            output = func(*args, **kwargs)
        except BaseException:
            self._running.pop()
            raise
        self._end(output)
        return output

    def _begin(self, call: Call, args: Any, kwargs: Mapping[str, Any]) -> None:
        call.arguments, call.options = tuple(args), kwargs
        tensors = [*tensors_in((args, kwargs))]
        call.inputs = [self._value(tensor) for tensor in tensors]
        if getattr(call.module, "inplace", False) or kwargs.get("inplace"):  # perhaps in training
            call.changed.update(value.storage for value in call.inputs)
        self._running.append((call, tensors, [observers.version(tensor) for tensor in tensors]))

    def _end(self, result: Any) -> None:
        call, inputs, versions = self._running.pop()
        outputs, given = [*tensors_in(result)], {id(tensor) for tensor in inputs}
        for tensor, value, version in zip(inputs, call.inputs, versions, strict=True):
            if observers.version(tensor) != version:
                call.changed.add(value.storage)
                outputs += self._sharing(value.storage)
        if not outputs:
            return  # a size, or anything else that is no tensor
        self.calls.append(call)
        for value in call.inputs:
            value.users.append(call)
        for tensor in {id(tensor): tensor for tensor in outputs}.values():
            known = self._values.get(id(tensor))
            if known is None or id(tensor) in given or known[1].storage in call.changed:
                value = Value(call, tensor.shape, _storage(tensor))
                call.outputs.append(value)
                self._values[id(tensor)] = tensor, value

    def _sharing(self, storage: int) -> list[Tensor]:
        """The recorded tensors in a storage: views of each other, which change together."""
        return [tensor for tensor, value in self._values.values() if value.storage == storage]

    def _value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._values:
            maker = self._running[-1][0] if self._running else None  # made inside of a layer
            value = Value(maker, tensor.shape, _storage(tensor))
            if maker is not None:
                maker.outputs.append(value)
            self._values[id(tensor)] = tensor, value
        return self._values[id(tensor)][1]


def _storage(tensor: Tensor) -> int:
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or id(storage)  # 0 for empty and "meta" tensors
    except (NotImplementedError, RuntimeError):  # a tensor without memory, such as a sparse one
        return id(tensor)
