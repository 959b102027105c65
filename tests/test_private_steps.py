"""What a step of a private run adds up: clipped gradients, views, micro-batches, noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("opacus")

from kernelnorm.experiments import trainer
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.data.poisson import PoissonSampling
from kernelnorm.experiments.private_steps import PrivateSteps, Seeds
from tests.private_runs import images_of, in_float64, known, small, steps_of


def change(steps: PrivateSteps, epoch: int = 0, step: int = 0) -> list[Tensor]:
    """What the first step of SGD adds to the weights, divided by what it multiplies the sum by."""
    before = [p.detach().clone() for p in steps.network.parameters()]
    (batch,) = [b for b in steps.batches(epoch, 0) if b.step == step]
    steps.take(batch)
    factor = -steps.optimizer.param_groups[0]["lr"] / steps.config.batch_size
    pairs = zip(before, steps.network.parameters(), strict=True)
    return [(after.detach() - start) / factor for start, after in pairs]


def loop(steps: PrivateSteps, network: nn.Module, epoch: int = 0, step: int = 0) -> list[Tensor]:
    """The sum over the samples of the clipped mean of the views' gradients, one after the other."""
    views, bound = steps.privacy.augmentations, steps.privacy.max_grad_norm
    ((x, y, _),) = steps.sampling.parts(epoch, step)
    total = [torch.zeros_like(p) for p in network.parameters()]
    assert len(y) > views
    for start in range(0, len(y), views):
        of_views = []
        for i in range(start, start + views):
            loss = F.cross_entropy(network(x[i : i + 1]), y[i : i + 1])
            of_views.append(torch.autograd.grad(loss, [*network.parameters()]))
        mean = [torch.stack(gradients).mean(0) for gradients in zip(*of_views, strict=True)]
        norm = torch.stack([g.norm() for g in mean]).norm()
        factor = min(1.0, bound / (norm.item() + 1e-6))
        for sum_, gradient in zip(total, mean, strict=True):
            sum_ += factor * gradient
    return total


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def numbered(epoch: int, step: int) -> torch.Generator:
    """Of each step another generator."""
    return torch.Generator().manual_seed(1000 * epoch + step)


@known
@pytest.mark.parametrize("norm", ["kernel", "group"])
@pytest.mark.parametrize("views", [1, 3])
def test_a_step_adds_the_clipped_gradients_of_a_loop(norm: str, views: int) -> None:
    config = small(norm, batch_size=6, augment=True, augmentations=views, max_grad_norm=0.5)
    steps = steps_of(config, images_of())
    network = trainer.build_network(steps.config, num_classes=3, in_channels=1).double()
    network.load_state_dict(steps.network.state_dict())
    expected = loop(steps, network)
    assert_close(change(steps), expected)


@known
def test_a_step_does_not_use_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    steps, seen = steps_of(small(batch_size=6), images_of()), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    steps.model.register_forward_hook(lambda *_: seen.append(flags()))
    steps.optimizer.attach_step_hook(lambda _: seen.append(flags()))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        steps.take(next(steps.batches(0, 0)))
        assert flags() == (True, "high")  # as before
    finally:
        torch.set_float32_matmul_precision(precision)
    assert seen == [(False, "highest")] * 2


@known
@pytest.mark.parametrize("most", [2, 3, 5, 100])
def test_micro_batches_have_the_sum_of_the_batch(most: int) -> None:
    """What augmentation draws for a sample is another thing in each part, so there is none."""

    def sums(**options: Any) -> list[Tensor]:
        config = small("group", batch_size=6, augment=True, augmentations=2, **options)
        steps = steps_of(config, images_of())
        steps.sampling = replace(steps.sampling, augment=None, generator=numbered)
        return change(steps)

    assert_close(sums(max_grad_norm=0.5, micro_batch_size=most), sums(max_grad_norm=0.5))


@known
def test_views_of_a_sample_are_one_after_the_other_and_not_split() -> None:
    images = images_of()
    sampling = PoissonSampling(
        images=images, rate=0.5, generator=numbered, seed=0, preprocess=in_float64, views=3
    )
    index = sampling.draw(2, 1)
    parts = [*sampling.parts(2, 1, most=4)]
    assert [len(x) for x, _, _ in parts] == [3] * len(index)
    assert [last for *_, last in parts] == [False] * (len(index) - 1) + [True]
    x = torch.cat([x for x, _, _ in parts])
    assert torch.equal(x, in_float64(images.pixels[index].repeat_interleave(3, 0)))


@known
@pytest.mark.parametrize("augment", [False, True])
def test_an_empty_batch_takes_a_step_of_noise(
    augment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(small(batch_size=6, augment=augment), images_of())
    empty = torch.tensor([], dtype=torch.int64)
    monkeypatch.setattr(PoissonSampling, "draw", lambda *_: empty)
    assert all((change_ == 0).all() for change_ in change(steps))
    assert steps.account.steps == 1
    steps.optimizer.noise_multiplier = 2.0
    before = [p.detach().clone() for p in steps.network.parameters()]
    (sums, images) = steps.take(next(steps.batches(0, 1)))
    assert images == 0
    assert torch.equal(sums, torch.zeros(2))
    after = [*steps.network.parameters()]
    assert not any(map(torch.equal, before, after))
    assert all(p.isfinite().all() for p in after)
    assert steps.account.steps == 2


@known
def test_averaged_weights_are_those_of_a_hand_loop() -> None:
    steps = steps_of(small(batch_size=6, ema=0.3), images_of(), dropout=True)
    mean: list[Tensor] = []
    for step, batch in enumerate([*steps.batches(0, 0), *steps.batches(1, 0)]):
        steps.take(batch)
        now = [p.detach().clone() for p in steps.network.parameters()]
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
        pairs = zip(mean or now, now, strict=True)
        mean = [decay * m + (1 - decay) * w for m, w in pairs]
    assert_close([*steps.evaluated.parameters()], mean)
    assert not any(map(torch.equal, steps.evaluated.parameters(), steps.network.parameters()))


@known
def test_noise_and_batch_are_functions_of_run_and_step() -> None:
    def noise(seed: int, step: int, taken: int = 0, **options: Any) -> Tensor:
        steps = steps_of(small("none", batch_size=6, seed=seed, **options), images_of())
        steps.sampling.images.pixels.zero_()
        steps.optimizer.noise_multiplier = 5.0
        for batch in [*steps.batches(0, 0)][:taken]:
            steps.take(batch)
        seen: list[Tensor] = []
        steps.optimizer.attach_step_hook(
            lambda optimizer: seen.extend(p.grad * 6 - p.summed_grad for p in optimizer.params)
        )
        steps.take([*steps.batches(0, 0)][step])
        return torch.cat([s.flatten() for s in seen])

    torch.testing.assert_close(noise(0, 1), noise(0, 1, taken=1))
    # Were the noise of two runs the same, the difference of their weights would tell it.
    for other in (noise(0, 0), noise(1, 1), noise(0, 1, epsilon=7.0), noise(0, 1, lr=0.3)):
        assert abs(torch.corrcoef(torch.stack([noise(0, 1), other]))[0, 1]) < 0.2
    assert noise(0, 1).std().item() == pytest.approx(5.0, rel=0.1)


def test_no_seed_comes_twice_in_a_run_nor_from_a_run_with_other_options_or_images() -> None:
    def seeds(images: Images, **options: Any) -> set[int]:
        seeds_ = Seeds(small(batch_size=6, **options), images, per_epoch=50, noise=1.0)
        steps = product(("batch", "noise"), range(200), range(50))
        found = {seeds_.of(what, epoch, step) for what, epoch, step in steps}  # type: ignore[arg-type]
        assert len(found) == 2 * 200 * 50
        assert max(found) < 2**32
        return found

    one = images_of()
    other = replace(one, labels=one.labels.flip(0))
    every = [seeds(one), seeds(other), seeds(one, lr=0.3), seeds(one, max_grad_norm=2.0)]
    assert len(set.union(*every)) == sum(map(len, every))


def test_batches_are_independent_poisson_samples() -> None:
    """Each image is in each batch with the sampling rate, and independently of the others."""
    n, rate, batches = 50, 0.1, 800
    sampling = PoissonSampling(
        images=images_of(n), rate=rate, generator=numbered, seed=3, preprocess=in_float64
    )
    drawn = [sampling.draw(epoch, step) for epoch in range(80) for step in range(10)]
    assert torch.equal(sampling.draw(7, 3), drawn[73])
    member = torch.stack([torch.zeros(n).index_fill(0, index, 1.0) for index in drawn])
    assert [len(index) for index in drawn] == member.sum(1).tolist()
    spread = (n * rate * (1 - rate)) ** 0.5
    assert member.sum(1).mean().item() == pytest.approx(n * rate, abs=5 * spread / batches**0.5)
    assert member.sum(1).std().item() == pytest.approx(spread, rel=0.15)
    deviation = (rate * (1 - rate) / batches) ** 0.5
    assert (member.mean(0) - rate).abs().max().item() < 5 * deviation
    assert torch.corrcoef(member.T).fill_diagonal_(0).abs().max().item() < 6 / batches**0.5
    assert abs(torch.corrcoef(member.flatten().unfold(0, 2, 1).T)[0, 1].item()) < 0.05
