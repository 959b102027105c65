"""The layers under what users put around a layer: copies, transforms, dtypes, devices."""

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
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import kernelnorm as kn
from kernelnorm.models import create_model
from kernelnorm.models.densenet import DenseNet
from tests.networks import assert_all_close, conv_and_norm, images, run
from tests.strategies import mask_of


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
def test_per_sample_gradients_are_those_of_a_loop(x: Tensor, training: bool):
    module = conv_and_norm().double().train(training)
    for layer in module:
        layer.dropout_p = 0.0 if training else 0.1
    parameters = dict(module.named_parameters())
    x = x.double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)
    for i, sample in enumerate(x):
        alone = grad(loss)(parameters, sample)
        assert_all_close([together[k][i] for k in alone], [*alone.values()], tolerance=1e-9)
        module.zero_grad()
        loss(dict(module.named_parameters()), sample).backward()
        assert_all_close([p.grad for p in module.parameters()], [*alone.values()], tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_with_dropout(x: Tensor):
    """One mask for all samples, so that a loop can draw it again."""
    module = conv_and_norm().double()
    parameters, x = dict(module.named_parameters()), x.double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],)).square().sum()

    torch.manual_seed(5)
    together = vmap(grad(loss), in_dims=(None, 0), randomness="same")(parameters, x)
    for i, sample in enumerate(x):
        torch.manual_seed(5)
        alone = torch.autograd.grad(loss(parameters, sample), [*parameters.values()])
        assert_all_close([together[k][i] for k in parameters], [*alone], tolerance=1e-9)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_several_output_gradients_at_once(x: Tensor, activation: str | None):
    """The written backward under vmap, of a forward that ran in a backend's kernels."""
    layer = kn.KNConv2d(4, 8, 3, activation=activation, dtype=torch.float64)
    x = x.double().repeat(1, 1, 4, 4).requires_grad_()
    y = layer(x)
    inputs, grads = [x, *layer.parameters()], torch.randn(3, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        alone = torch.autograd.grad(y, inputs, g, retain_graph=True)
        assert_all_close([t[i] for t in together], [*alone], tolerance=1e-9)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_masks_as_it_is_told(x: Tensor, randomness: str):
    layer = kn.KNConv2d(4, 8, 3, dropout_p=0.5)
    twice = torch.stack([x, x])
    first, second = vmap(layer, randomness=randomness)(twice)
    assert torch.equal(first, second) == (randomness == "same")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [None, torch.float32, torch.float64])
def test_autocast(x: Tensor, dtype: torch.dtype, input_dtype: torch.dtype | None):
    """Low-precision outputs near the float32 ones, float32 gradients, float64 left alone."""
    input_dtype = input_dtype or dtype
    module = conv_and_norm()
    if input_dtype == torch.float64:
        module.double()
    parameters = [*module.parameters()]

    def with_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            y = module(x)
        assert y.dtype == (torch.float64 if input_dtype == torch.float64 else dtype)
        return y

    exact = run(module.double(), x.double(), parameters)
    module.to(torch.float64 if input_dtype == torch.float64 else torch.float32)
    low = run(with_autocast, x.to(input_dtype), [*module.parameters()])
    assert [t.dtype for t in low[2:]] == [p.dtype for p in module.parameters()]
    for a, b in zip(low, exact, strict=True):
        assert (a.double() - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_in_another_dtype(x: Tensor, dtype: torch.dtype):
    module = conv_and_norm().to(dtype)
    results = run(module, x.to(dtype), [*module.parameters()])
    assert {t.dtype for t in results} == {dtype}
    assert all(t.isfinite().all() for t in results)


def test_meta_device():
    with torch.device("meta"):
        module = conv_and_norm()
        y = module(torch.randn(3, 4, 9, 8, requires_grad=True))
    assert y.is_meta
    y.sum().backward()
    expected = conv_and_norm()(torch.randn(3, 4, 9, 8))
    assert y.shape == expected.shape
    kn.KNConv2d(4, 8, 3, device="meta").to_empty(device="cpu").reset_parameters()


def test_channels_last_module(x: Tensor):
    module, x = conv_and_norm().double(), x.double()
    parameters = [*module.parameters()]
    expected = run(module, x, parameters)
    module.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_all_close(run(module, x, parameters), expected)


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


def small_densenet() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(8, (2, 2, 1, 1), 16, "kernel", 4, 3, True, None).double()


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
    network, expected = small_densenet(), training_step(small_densenet(), photos)
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
    network = small_densenet()
    for layer in convolutions(network):
        parametrizations.spectral_norm(layer)
    network(photos).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    y = network.eval()(photos)
    torch.testing.assert_close(y, network(photos))


def test_pruning(photos: Tensor):
    network = small_densenet()
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
    expected = training_step(small_densenet(), photos)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with context():
            results = training_step(small_densenet(), photos)
    assert_all_close(results, expected, tolerance=1e-9)


def test_deterministic_algorithms(photos: Tensor):
    expected = training_step(small_densenet(), photos)
    torch.use_deterministic_algorithms(True)
    try:
        results = training_step(small_densenet(), photos)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_all_close(results, expected, tolerance=1e-9)


def test_averaged_weights(photos: Tensor):
    network = small_densenet()
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    network(photos).sum().backward()
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    average.update_parameters(network)
    assert average.eval()(photos).isfinite().all()


def test_a_scaled_loss_in_half_precision(photos: Tensor):
    network, photos = small_densenet().float(), photos.float()
    optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(network(photos), torch.tensor([0, 1]))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in network.parameters())


# Use before: inference mode, other threads, a changed layer


def test_inference_mode_first_and_training_afterwards(photos: Tensor, caplog):
    network, fresh = small_densenet(), small_densenet()
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
    constant = min(step(0.1) for _ in range(5))
    annealed = min(step(0.1 - 0.003 * i) for i in range(5))
    assert annealed < 5 * constant + 0.02


# Dtypes and devices


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_other_default_dtypes_and_devices(default: torch.dtype, device: str | None, bias: bool):
    """Also a default device that is not that of the tensors."""
    layers = [
        kn.KNConv2d(4, 8, 3, padding=1, stride=2, activation="relu", bias=bias),
        kn.KernelNorm2d(2, stride=1), kn.KNConv2d(8, 4, 1, bias=bias),
    ]  # fmt: skip
    network, x = nn.Sequential(*layers).float(), images().float()
    expected = run(network, x, [*network.parameters()])
    try:
        torch.set_default_dtype(default)
        torch.set_default_device(device)
        results = run(network, x, [*network.parameters()])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_all_close(results, expected, tolerance=0)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_parameter_on_another_device_is_an_error_that_names_both(x: Tensor, part: str):
    layer = kn.KNConv2d(4, 8, 3)
    setattr(layer, part, nn.Parameter(getattr(layer, part).to("meta")))
    with pytest.raises(ValueError, match=rf"input on cpu, .*{part} on meta.*\.to\(device\)"):
        layer(x)
    with pytest.raises(ValueError, match=r"input on meta, weight on cpu"):
        kn.KNConv2d(4, 8, 3)(x.to("meta"))


def test_volumes_of_ct_with_anisotropic_windows():
    """As nnU-Net has them: Hounsfield units, a LeakyReLU in place, two samples."""
    torch.manual_seed(0)
    network = nn.Sequential(
        kn.KNConv3d(1, 8, (1, 3, 3), padding=(0, 1, 1)), nn.LeakyReLU(0.01, inplace=True),
        kn.KNConv3d(8, 16, 3, stride=(1, 2, 2), padding=1), nn.LeakyReLU(0.01, inplace=True),
        kn.KNConv3d(16, 16, 3, stride=2, padding=1), nn.LeakyReLU(0.01, inplace=True),
        nn.ConvTranspose3d(16, 8, (2, 4, 4), (2, 4, 4)), kn.KNConv3d(8, 3, 1),
    )  # fmt: skip
    x = torch.randn(2, 1, 6, 24, 20) * 400 - 700
    for training in (True, False):
        results = []
        for dtype in (torch.float32, torch.float64):
            module = copy.deepcopy(network).to(dtype).train(training)
            results.append(run(module, x.to(dtype), [*module.parameters()], seed=3))
        for single, double in zip(*results, strict=True):
            assert (single.double() - double).norm() <= 1e-2 * double.norm() + 1e-6
        network.train(training)
        exact = results[1][0]
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype):
                low = network(x)
            assert (low.double() - exact).norm() < 0.1 * exact.norm()


def test_views_that_negate():
    """The imaginary part of a conjugate has its sign in a flag, not in memory."""
    layer = kn.KNConv2d(3, 4, 3, activation="relu").eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), layer(x.resolve_neg()))
    y = layer(torch.randn(2, 3, 6, 6).requires_grad_())
    inputs = [*layer.parameters()]
    grad = torch.randn(y.shape, dtype=torch.complex64).conj().imag
    results = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    assert_all_close([*results], [*torch.autograd.grad(y, inputs, grad.resolve_neg())])


# Gradients of gradients, and of many at once


@pytest.mark.parametrize("keys", ["a mask that drops nothing", "no mask"])
def test_second_derivatives_at_windows_of_one_value(keys: str):
    """They do not depend on which way rounding left a variance of zero."""
    masked = keys != "no mask"
    layer = kn.KNConv2d(12, 2, 1, bias=False, dtype=torch.float64, dropout_p=0.1 * masked)
    shape = 1, 12, 1, 1
    seed = 0
    while masked and not mask_of(seed, torch.Size(shape), 0.1).all():
        seed += 1
    values = []
    for value in (1.0, 1.3, 3.0706, 2.682, 2.5306, 2.0):
        x = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(seed)
        (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[0, 0].sum(), x)
        values.append(second.abs().max().item() / (value if masked else 1))
    assert max(values) - min(values) <= 1e-6 * max(*values, 1)


def test_an_ensemble_under_vmap():
    def make() -> nn.Module:
        return nn.Sequential(
            kn.KNConv2d(3, 8, 3, padding=1, activation="relu"), kn.KernelNorm2d(1),
            kn.KNConv2d(8, 8, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 4),
        )  # fmt: skip

    networks = [make().eval() for _ in range(3)]
    parameters, buffers = stack_module_state(networks)
    base, x = copy.deepcopy(networks[0]).to("meta"), torch.randn(2, 3, 16, 16)

    def call(parameters, buffers, x: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    def loss(parameters, buffers, x: Tensor) -> Tensor:
        return call(parameters, buffers, x).square().sum()

    y = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([n(x) for n in networks]), rtol=1e-4, atol=1e-4)
    gradients = vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    networks[1](x).square().sum().backward()
    for name, parameter in networks[1].named_parameters():
        torch.testing.assert_close(gradients[name][1], parameter.grad, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters.values())
    base.train()
    z = vmap(call, in_dims=(0, 0, None), randomness="different")(parameters, buffers, x)
    assert z.shape == y.shape


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
