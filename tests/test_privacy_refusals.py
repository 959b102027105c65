"""What private training with bookkeeping refuses, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("opacus")

from torch.utils.flop_counter import FlopCounterMode

import kernelnorm as kn
from kernelnorm.privacy import PrivacyEngine
from tests.bookkeeping import classification, images, private, small
from tests.per_sample import loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def test_unknown_layers_are_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.LayerNorm(7))
    with pytest.raises(NotImplementedError, match=r"'1' is a torch.nn.*PReLU; '2' is.*LayerNorm"):
        private(network, images(2))
    for parameter in [*network[1].parameters(), *network[2].parameters()]:
        parameter.requires_grad_(False)
    private(network, images(2))


def test_subclasses_are_unknown() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(NotImplementedError, match=r"'0' is a .*Scaled"):
        private(nn.Sequential(Scaled(3, 3)), images(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(NotImplementedError, match=f"'weight' of '0' is in {dtype}"):
        private(nn.Sequential(nn.Linear(3, 3)).to(dtype), images(2))


def test_a_layer_that_is_trained_later_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(300, 4), nn.Linear(4, 3))
    network[1].requires_grad_(False)
    x = torch.randn(2, 3, 10, 10)
    network, optimizer, _ = private(network, x)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    network(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(4, 300\) is trained now but was not .*again"):
        optimizer.step()


def test_shared_parameters_are_named() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    with pytest.raises(NotImplementedError, match="'weight' of '1' also belongs to '0'"):
        private(nn.Sequential(one, other), images(2))
    with pytest.raises(NotImplementedError, match="'1' is also '0'"):
        private(nn.Sequential(one, one), images(2))


def test_replaced_forward_methods_are_named() -> None:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    with pytest.raises(NotImplementedError, match="forward method of '0' was replaced"):
        private(nn.Sequential(layer), images(2))


class Around(nn.Module):
    """Does something else with a layer."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer, x)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda layer, x: layer(layer(x)), "layer 'layer' is called more than once"),
        (lambda layer, x: layer(x) @ layer.weight, "'layer.weight' is used outside of its layer"),
    ],
)
def test_uses_that_would_not_be_clipped_are_refused(
    use: Callable[[nn.Linear, Tensor], Tensor], message: str
) -> None:
    network, optimizer, _ = private(Around(use), images(2))
    optimizer.zero_grad()
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        network(torch.randn(2, 4)).sum().backward()


def test_a_copy_refuses_what_the_original_does() -> None:
    network, *_ = private(Around(lambda layer, x: layer(x) @ layer.weight), images(2))
    with pytest.raises(RuntimeError, match=r"'layer\.weight' is used outside of its layer"):
        copy.deepcopy(network)(torch.randn(2, 4)).sum().backward()


def test_a_batch_that_is_folded_is_refused() -> None:
    """Samples that became positions of one have no norms of their own."""
    network = nn.Sequential(
        nn.Linear(4, 4), nn.Flatten(0), nn.Unflatten(0, (1, 8)), nn.Linear(8, 2)
    )
    network, optimizer, _ = private(network, images(2))
    network(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"one batch size in all layers, got {'3': 1, '0': 2}"):
        optimizer.step()


def test_frames_that_become_samples_are_refused() -> None:
    """A sample of five frames could move the sum by five times the bound."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    class Nested(Frames):
        def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
            return super().forward(batch["frames"][0])

    class Positions(Frames):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().forward(x) + positions.mean()

    frames = torch.randn(2, 5, 4)
    for network, arguments, rows in (
        (Frames(), [frames], r"\[2\]"),
        (Nested(), [{"frames": [frames]}], r"\[2\]"),
        (Positions(), [frames, torch.randn(10)], r"\[2, 10\]"),
    ):
        network, optimizer, _ = private(network, images(2))
        network(*arguments).sum().backward()
        with pytest.raises(RuntimeError, match=f"got batches of {rows}, and its layers batches"):
            optimizer.step()


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(64, 64, 3, padding=1), kn.KNConv2d(64, 64, 3, padding=1), nn.Linear(64, 8)]
)
def test_an_input_that_is_changed_before_the_step_is_refused(layer: nn.Module) -> None:
    """Clipped by the norms of one batch, the sum of another could exceed the bound."""
    network, optimizer, _ = private(nn.Sequential(layer), images(2))
    x = torch.randn(2, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 64, 2, 2)
    network(x).sum().backward()
    x.copy_(torch.randn(x.shape) * 100)
    with pytest.raises(RuntimeError, match="input of a layer was changed in place between"):
        optimizer.step()
    optimizer.zero_grad()
    network(x).sum().backward()
    optimizer.step()
    x.zero_()


def test_parameters_that_the_optimizer_lacks_are_named() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    options = {"data_loader": loader(images(2), 2), "max_grad_norm": 1.0, "noise_multiplier": 0.0}
    head = torch.optim.SGD(network[1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer lacks '0\.weight', '0\.bias', which"):
        PrivacyEngine().make_private(module=network, optimizer=head, **options)


def test_parameters_that_were_replaced_are_refused() -> None:
    network, optimizer, _ = private(nn.Sequential(nn.Linear(4, 3)), images(2))
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    network(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the optimizer does not have, of shape .*assign=True"):
        optimizer.step()


def test_layers_can_be_frozen_later() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(196, 3))
    wrapped, optimizer, _ = private(network, images(2))
    network[:2].requires_grad_(False)
    before = [p.detach().clone() for p in network.parameters()]
    classification(wrapped(images(2, dtype=torch.float32))).mean().backward()
    optimizer.step()
    changed = [not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)]
    assert changed == [False] * 4 + [True] * 2


def test_a_network_is_given_back_if_the_loader_is_refused() -> None:
    network = small()
    options = {"optimizer": torch.optim.SGD(network.parameters(), lr=0.1), "max_grad_norm": 1.0}
    with pytest.raises(AttributeError):
        PrivacyEngine().make_private(
            module=network, data_loader="no loader", noise_multiplier=0.0, **options
        )
    assert "forward" not in vars(network[0])
    private(network, images(2))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 4), (4,)),
        (nn.Conv2d(3, 4, 3), (3, 5, 5)),
        (kn.KNConv2d(3, 4, 3), (3, 5, 5)),
        (kn.KNConv1d(3, 4, 3), (3, 5)),
    ],
)
def test_inputs_without_a_batch_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    network, _, _ = private(nn.Sequential(layer), images(2))
    with pytest.raises(ValueError, match="needs a batch"):
        network(torch.randn(shape))


def test_parameters_that_become_bfloat16_are_refused() -> None:
    x = torch.randn(2, 3)
    network, optimizer, _ = private(nn.Sequential(nn.Linear(3, 2)), x)
    network.to(torch.bfloat16)(x.bfloat16()).mean().backward()
    with pytest.raises(RuntimeError, match=r"in torch\.bfloat16, .*: expected float32 or float64"):
        optimizer.step()


def test_data_parallel_is_refused() -> None:
    network = nn.DataParallel(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="around the network, got DataParallel"):
        private(network, torch.randn(2, 3))


def test_inputs_without_tensors_are_refused() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Any) -> Tensor:
            y: Tensor = self.layer(x())
            return y

    x = torch.randn(2, 3)
    network, optimizer, _ = private(Wrapped(), x)
    network(lambda: x).mean().backward()
    with pytest.raises(RuntimeError, match="found no tensor among the network's inputs"):
        optimizer.step()


def test_a_step_needs_a_backward_pass() -> None:
    _, optimizer, _ = private(small(), images(2))
    with pytest.raises(RuntimeError, match="expected the gradients of a backward pass"):
        optimizer.step()


def test_second_derivatives_are_refused() -> None:
    network, _, _ = private(small(), images(2))
    loss = classification(network(images(2, dtype=torch.float32))).mean()
    with pytest.raises(NotImplementedError, match="create_graph"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("eager", RuntimeError, r"'0\.weight' is used outside of its layer"),
        pytest.param(
            *("aot_eager", NotImplementedError, "compiled layers .* are not supported"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_compiled_networks_are_refused(backend: str, error: type[Exception], message: str) -> None:
    torch._dynamo.reset()
    network, _, _ = private(nn.Sequential(kn.KNConv2d(3, 4, 3)), images(2))
    with pytest.raises(error, match=message):
        torch.compile(network, backend=backend)(images(2, dtype=torch.float32)).sum().backward()


def test_counted_networks_are_refused() -> None:
    """A counter of FLOPs gets PyTorch's own operations."""
    network, _, _ = private(nn.Sequential(kn.KNConv2d(3, 4, 3)), images(2))
    refused = pytest.raises(NotImplementedError, match="compiled layers")
    with FlopCounterMode(display=False), refused:
        network(images(2, dtype=torch.float32))


@pytest.mark.parametrize(
    "options",
    [{"clipping": "per_layer"}, {"wrap_model": False}, {"batch_first": False}],
)
def test_options_of_other_modes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bookkeeping"):
        private(small(), images(2), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", [1.0, 1.0]), ("max_grad_norm", -1.0), ("noise_multiplier", -1.0)],
)
def test_options_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        private(small(), images(2), **{name: value})
