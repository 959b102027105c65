"""The layers under everything that PyTorch puts around a layer."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import kernelnorm as kn
from kernelnorm.ops import DIFFERENTIABLE, primitives_for
from kernelnorm.ops.mask import draw_keys, keep, spread_keys


def conv_and_norm() -> nn.Sequential:
    """One of each, with everything on that could be in the way."""
    torch.manual_seed(0)
    return nn.Sequential(
        kn.KNConv2d(4, 8, 3, stride=2, padding=1, groups=2, activation="relu"),
        kn.KernelNorm2d(2, stride=1),
        kn.KNConv2d(8, 6, 3, padding="same", padding_mode="reflect"),
        kn.KernelNorm2d(1),
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0))


def run(module, x: Tensor, parameters: list[Tensor], seed: int = 7) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def assert_all_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph_traces_forward_and_backward(x: Tensor, training: bool):
    module, x = conv_and_norm().double().train(training), x.double()
    parameters = [*module.parameters()]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = run(module, x, parameters)
    assert_all_close(run(compiled, x, parameters), expected, tolerance=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts
def test_compile_fullgraph_with_inductor(x: Tensor):
    """Generated code, first for one batch size and then for any."""
    layers = [kn.KNConv2d(4, 8, 3, padding=1, activation="relu"), kn.KernelNorm2d(1)]
    module, x = nn.Sequential(*layers).double(), x.double()
    parameters = [*module.parameters()]
    compiled = torch.compile(module, fullgraph=True)
    for batch in (x, x[:2], x):
        # It draws its own random numbers: a seed repeats, but is not the one of eager mode.
        first = run(compiled, batch, parameters)
        assert_all_close(run(compiled, batch, parameters), first, tolerance=0)
    module.eval()
    assert_all_close(run(compiled, x, parameters), run(module, x, parameters))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own parts
def test_inductor_makes_the_mask_of_eager_mode():
    compiled = torch.compile(keep, fullgraph=True)
    for shape in ((3, 4, 9, 8), (2, 5, 7)):
        keys = spread_keys(draw_keys(shape, torch.device("cpu")), shape, 0.3)
        assert torch.equal(compiled(keys, torch.float32), keep(keys, torch.float32))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export_with_a_dynamic_batch(x: Tensor, strict: bool, training: bool):
    module = conv_and_norm().train(training)
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, (x,), strict=strict, dynamic_shapes=({0: batch},))
    for inputs in (x, torch.randn(5, 4, 9, 8)):
        torch.manual_seed(1)
        y = program.module()(inputs)
        torch.manual_seed(1)
        torch.testing.assert_close(y, module(inputs))


def test_onnx(x: Tensor, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module = conv_and_norm().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            module, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},)
        )
    program.save(str(tmp_path / "module.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "module.onnx"))
    for inputs in (x, torch.randn(5, 4, 9, 8)):
        (y,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), module(inputs), rtol=1e-3, atol=1e-3)


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
    """The written backward under vmap, of an input that is large enough for compiled loops."""
    layer = kn.KNConv2d(4, 8, 3, activation=activation, dtype=torch.float64)
    x = x.double().repeat(1, 1, 4, 4).requires_grad_()
    assert primitives_for(x) is not DIFFERENTIABLE
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
