"""The layers under what users put around them: copies, checkpoints, processes, wrapped weights."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import kernelnorm as kn
from kernelnorm.models import create_model
from kernelnorm.models.densenet import DenseNet
from tests.networks import assert_all_close, conv_and_norm, images, run, small_densenet


@pytest.fixture
def x() -> Tensor:
    return images()


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301 (made a moment ago)
    ],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(x: Tensor, duplicate):
    module = conv_and_norm()
    other = duplicate(module)
    parameters, others = [*module.parameters()], [*other.parameters()]
    assert_all_close(run(module, x, parameters), run(other, x, others), tolerance=0)
    with torch.no_grad():
        others[0].zero_()
    assert parameters[0].abs().sum() > 0
    assert repr(other) == repr(module)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask(x: Tensor, use_reentrant: bool):
    module = conv_and_norm()
    parameters = [*module.parameters()]

    def gradients(function) -> list[Tensor]:
        module.zero_grad()
        torch.manual_seed(3)
        function(x.clone().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in parameters]

    plain = gradients(module)
    assert_all_close(
        gradients(lambda x: checkpoint(module, x, use_reentrant=use_reentrant)), plain, tolerance=0
    )


def test_save_and_load_of_weights_only(x: Tensor):
    buffer = io.BytesIO()
    module = conv_and_norm()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = conv_and_norm()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.eval()(x), module.eval()(x))


def _ddp_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    module = conv_and_norm()
    for layer in module:
        layer.dropout_p = 0.0
    parallel = nn.parallel.DistributedDataParallel(module)
    x = torch.randn(4, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in module.parameters()], f"{folder}/gradients")
    torch.distributed.barrier()  # or one leaves while the other is still talking to it
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group, and can abort an interpreter that is ending


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path):
    """Two processes with half of the batch each get the gradients of the whole."""
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    module = conv_and_norm()
    for layer in module:
        layer.dropout_p = 0.0
    x = torch.randn(4, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    module(x).square().mean().backward()
    gradients = torch.load(tmp_path / "gradients", weights_only=True)
    assert_all_close(gradients, [p.grad for p in module.parameters()])


def densenet() -> DenseNet:
    return small_densenet().double()


def training_step(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    network.train().zero_grad()
    torch.manual_seed(3)
    y = network(x)
    y.square().mean().backward()
    return [y, *(p.grad for p in network.parameters())]


@pytest.fixture
def photos() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def convolutions(network: nn.Module) -> list[kn.KNConv2d]:
    return [m for m in network.modules() if isinstance(m, kn.KNConv2d)]


# Wrapped weights, averaged weights, saved tensors, scaled losses


def test_weight_norm(photos: Tensor):
    network, expected = densenet(), training_step(densenet(), photos)
    for layer in convolutions(network):
        parametrizations.weight_norm(layer)
    y, *gradients = training_step(network, photos)
    torch.testing.assert_close(y, expected[0], rtol=1e-9, atol=1e-9)
    assert all(g.isfinite().all() for g in gradients)
    for layer in convolutions(network):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(training_step(network, photos)[0], y, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_old_weight_norm(x: Tensor):
    layer = kn.KNConv2d(4, 6, 3, activation="relu", dtype=torch.float64)
    wrapped = nn.utils.weight_norm(layer)
    x = x.double()
    torch.manual_seed(1)
    y = wrapped(x)
    y.sum().backward()
    assert wrapped.weight_g.grad.isfinite().all()
    nn.utils.remove_weight_norm(wrapped)
    torch.manual_seed(1)
    torch.testing.assert_close(wrapped(x), y)


def test_spectral_norm(photos: Tensor):
    network = densenet()
    for layer in convolutions(network):
        parametrizations.spectral_norm(layer)
    network(photos).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    y = network.eval()(photos)
    for layer in convolutions(network):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=0.2)  # by power iteration
    torch.testing.assert_close(network(photos), y)


def test_pruning(photos: Tensor):
    network = densenet()
    for layer in convolutions(network):
        prune.l1_unstructured(layer, "weight", 0.3)
    network(photos).sum().backward()
    for layer in convolutions(network):
        assert (layer.weight == 0).double().mean() > 0.25
        assert layer.weight_orig.grad[layer.weight == 0].eq(0).all()
    y = training_step(network, photos)[0]
    for layer in convolutions(network):
        prune.remove(layer, "weight")
    torch.testing.assert_close(training_step(network, photos)[0], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "context",
    [torch.autograd.graph.save_on_cpu, lambda: torch.autograd.set_detect_anomaly(True)],
    ids=["saved on the CPU", "anomaly detection"],
)
def test_contexts_of_autograd(photos: Tensor, context: Callable[[], AbstractContextManager]):
    expected = training_step(densenet(), photos)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with context():
            results = training_step(densenet(), photos)
    assert_all_close(results, expected, tolerance=1e-9)


def test_deterministic_algorithms(photos: Tensor):
    expected = training_step(densenet(), photos)
    torch.use_deterministic_algorithms(True)
    try:
        results = training_step(densenet(), photos)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_all_close(results, expected, tolerance=1e-9)


def test_averaged_weights(photos: Tensor):
    network = densenet()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer, weights = torch.optim.SGD(network.parameters(), lr=1e-2), []
    for _ in range(2):
        network(photos).sum().backward()
        optimizer.step()
        average.update_parameters(network)
        weights.append([p.detach().clone() for p in network.parameters()])
    expected = [0.9 * old + 0.1 * new for old, new in zip(*weights, strict=True)]
    assert not torch.allclose(expected[0], weights[0][0])
    assert_all_close([*average.parameters()], expected, tolerance=1e-9)
    other = densenet().eval()
    other.load_state_dict(average.module.state_dict())
    assert torch.equal(average.eval()(photos), other(photos))


def test_a_scaled_loss_in_half_precision():
    """Two steps move the parameters as those in float32 do, up to rounding by ReLUs near zero."""
    photos, updates = images(2, 3, 32, 32), []
    for half in (True, False):
        network = densenet().float()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=half)
        before, scale = nn.utils.parameters_to_vector(network.parameters()), scaler.get_scale()
        torch.manual_seed(3)
        for _ in range(2):
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = nn.functional.cross_entropy(network(photos), torch.tensor([0, 1]))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == scale  # no gradient overflowed
        updates.append(nn.utils.parameters_to_vector(network.parameters()) - before)
    low, exact = updates
    assert (low - exact).norm() < 0.3 * exact.norm()


# Use before: inference mode, other threads, a changed layer


def test_inference_mode_first_and_training_afterwards(photos: Tensor, caplog):
    network, fresh = densenet(), densenet()
    with torch.inference_mode():
        network.eval()(photos)
        network.train()(photos)
        scores = network.eval()(photos)
    results, expected = training_step(network, photos), training_step(fresh, photos)
    assert_all_close(results, expected, tolerance=1e-9)
    assert torch.equal(scores, fresh.eval()(photos))
    assert not caplog.records


@pytest.mark.parametrize("training", [True, False])
def test_threads_that_serve_at_once(training: bool):
    """Other models answer, too."""
    layer = kn.KNConv2d(8, 8, 3, padding=1, activation="relu", dropout_p=0.0).train(training)
    other = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 8, 32, 32)

    def step(module: nn.Module) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    expected = step(layer), step(other)
    with ThreadPoolExecutor(8) as pool:
        results = [*pool.map(step, [layer, other] * 16)]
    for i, result in enumerate(results):
        assert_all_close(result, expected[i % 2], tolerance=1e-6)


def test_strides_that_are_changed_to_dilation():
    """As segmentation networks do to the last part of a trunk."""
    for name, part in (("resnet18", "layer4"), ("densenet121", "features.denseblock4")):
        network = create_model(name, num_classes=4, small_images=True).eval()
        x = torch.randn(1, 3, 32, 32)
        network(x)
        for layer in convolutions(network.get_submodule(part)):
            layer.stride, layer.dilation = (1, 1), (2, 2)
            layer.padding = tuple(k // 2 * 2 for k in layer.kernel_size)
        with torch.no_grad():
            y, exact = network(x), copy.deepcopy(network).double()(x.double())
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max())
        if name == "resnet18":
            network.train()(x).sum().backward()


def test_a_schedule_of_dropout_takes_no_longer():
    layer = kn.KNConv2d(16, 16, 3, padding=1, activation="relu")
    x = torch.randn(2, 16, 32, 32, requires_grad=True)

    def step(p: float) -> float:
        layer.dropout_p = p
        begin = time.perf_counter()
        layer(x).sum().backward()
        return time.perf_counter() - begin

    step(0.1)
    times = [(step(0.1), step(0.1 - 0.003 * i)) for i in range(1, 21)]  # each rate is new
    constant, annealed = map(min, zip(*times, strict=True))
    assert annealed < 3 * constant + 0.001


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_server_that_forks_after_use():
    """With one thread; with more, a fork hangs after PyTorch's own layers, too."""
    program = (
        "import os, torch, kernelnorm as kn; torch.set_num_threads(1);"
        "layer, x = kn.KNConv2d(16, 32, 3).eval(), torch.randn(4, 16, 64, 64);"
        "layer(x); pid = os.fork(); layer(x);"
        "os._exit(0) if pid == 0 else None;"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
