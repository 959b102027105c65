"""Private runs: what a step adds up, what it spends, and that a stopped run spends no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("opacus")

from lightning_fabric import Fabric
from opacus.accountants import RDPAccountant

from kernelnorm import cli
from kernelnorm.experiments import account, private, trainer
from kernelnorm.experiments.account import Account, noise_multiplier
from kernelnorm.experiments.compare import Row, compare
from kernelnorm.experiments.config import RunConfig, configure
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.data.poisson import PoissonSampling
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.evaluation import evaluate
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.privacy import Privacy
from kernelnorm.experiments.private import PrivateSteps, Seeds
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.report import report
from kernelnorm.experiments.runs import RunFolder
from kernelnorm.experiments.steps import Material
from kernelnorm.experiments.trainer import train
from tests.processes import wait_for
from tests.test_trainer import assert_same_weights, without_times

SMALL: dict[str, Any] = {"batch_size": 16, "epochs": 2, "subset": 60, "image_size": 8, "lr": 0.05}
PER_EPOCH = 4  # 60 / 16, rounded


def small(norm: str = "kernel", **options: Any) -> RunConfig:
    """A private run of 8 steps; the options of private training and of others."""
    names = Privacy.__dataclass_fields__
    privacy = Privacy(**{name: options.pop(name) for name in [*options] if name in names})
    recipe = replace(recipe_for("digits-vgg8"), model_options={"width": 0.0625})
    return configure(recipe, **{"norm": norm, **SMALL, "private": privacy, **options})


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A noise that is far from the budget, and an account of few orders, both without waiting."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 2.0)
    monkeypatch.setattr(account, "ORDERS", [*range(2, 64)])


known = pytest.mark.usefixtures("known_noise")


def images_of(n: int = 12, size: int = 8) -> Images:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (n, 1, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 3, ("a", "b", "c"))


def in_float64(pixels: Tensor) -> Tensor:
    return pixels.double() / 255


def steps_of(config: RunConfig, images: Images, dropout: bool = False) -> PrivateSteps:
    """Private steps in float64, without noise, and without dropout if a loop is to repeat them."""
    torch.manual_seed(0)
    options = {"width": 0.0625} if dropout else {"width": 0.0625, "rules": {"dropout_p": 0.0}}
    config = replace(
        config, model_options=options if config.norm == "kernel" else {"width": 0.0625}
    )
    network = trainer.build_network(config, num_classes=3, in_channels=1).double()
    fabric = Fabric(accelerator="cpu", devices=1)
    steps = PrivateSteps(Material(config, fabric, network, images, in_float64, False))
    steps.optimizer.noise_multiplier = 0.0
    return steps


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


# The sum of a step


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
def numbered(epoch: int, step: int) -> torch.Generator:
    """Of each step another generator."""
    return torch.Generator().manual_seed(1000 * epoch + step)


@pytest.mark.parametrize("most", [1, 2, 5, 100])
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
def test_an_empty_batch_takes_a_step_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(small(batch_size=6), images_of())
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
        seeds_ = Seeds(small(batch_size=6, **options), images, per_epoch=50)
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


# The budget


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 50.0])
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_the_least_noise_keeps_to_the_budget(epsilon: float) -> None:
    noise = noise_multiplier(Privacy(epsilon=epsilon), 0.25, 8)
    reference = RDPAccountant()
    reference.history = [(noise, 0.25, 8)]
    assert 0.97 * epsilon < reference.get_epsilon(1e-5, alphas=account.ORDERS) <= epsilon
    spent = Account(noise, 0.25, 1e-5)
    assert spent.epsilon() == 0
    assert spent.epsilon(more=8) == reference.get_epsilon(1e-5, alphas=account.ORDERS)
    for _ in range(5):
        spent.accountant.step(noise_multiplier=noise, sample_rate=0.25)
    reference.history = [(noise, 0.25, 5)]
    assert spent.epsilon() == reference.get_epsilon(1e-5, alphas=account.ORDERS)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(12.0, 64 / 1437, 90), (16.0, 128 / 1437, 220)]
)
def test_the_last_step_is_within_the_budget(epsilon: float, rate: float, steps: int) -> None:
    """The search for a noise has orders that the accountant's own list lacks."""
    noise = noise_multiplier(Privacy(epsilon=epsilon), rate, steps)
    assert Account(noise, rate, 1e-5).epsilon(more=steps) <= epsilon


@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_a_run_spends_its_budget_and_not_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(small(epsilon=3.0), Launch(out=tmp_path))
    out = capsys.readouterr().out
    assert "private: epsilon 3 at delta 1e-05, clipping norm 1" in out
    found = folder.read_config()["privacy"]
    assert (found["steps"], found["sampling_rate"]) == (2 * PER_EPOCH, 16 / 60)
    history = folder.read_metrics()
    reference = RDPAccountant()
    for epoch, metrics in enumerate(history, 1):
        reference.history = [(found["noise_multiplier"], 16 / 60, epoch * PER_EPOCH)]
        assert metrics["epsilon"] == reference.get_epsilon(1e-5, alphas=account.ORDERS)
        assert f"epsilon {metrics['epsilon']:.2f}" in out
    assert 2.9 < history[-1]["epsilon"] <= 3.0
    state = folder.load("last.ckpt")
    assert state is not None
    assert state["accountant"]["history"] == [(found["noise_multiplier"], 16 / 60, 2 * PER_EPOCH)]


@known
def test_a_step_beyond_the_budget_is_not_taken() -> None:
    steps = steps_of(small(epsilon=2.5, batch_size=6), images_of())
    batches = ((epoch, step) for epoch in range(100) for step in range(steps.per_epoch))
    while steps.account.epsilon(more=1) <= 2.5:
        steps.optimizer.noise_multiplier = 2.0  # as the account knows it
        steps.take(private.Batch(*next(batches)))
    taken, before = steps.account.steps, deepcopy(steps.network.state_dict())
    assert taken > 0
    with pytest.raises(RunError, match=r"budget is spent: \d+ steps have .* above --epsilon 2.5"):
        steps.take(private.Batch(*next(batches)))
    assert steps.account.steps == taken
    assert steps.account.epsilon() <= 2.5
    assert all(torch.equal(x, before[name]) for name, x in steps.network.state_dict().items())


# Stopped, resumed, used


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "augmentations": 2, "augment": True}])
@known
def test_paused_run_ends_with_the_same_weights_and_epsilon(
    options: dict[str, Any], tmp_path: Path
) -> None:
    whole, paused, config = tmp_path / "whole", tmp_path / "paused", small(**options)
    train(config, Launch(out=whole, verbose=False))
    for stop in (1, 4, 6):
        train(config, Launch(out=paused, max_steps=stop, verbose=False))
        state = RunFolder(paused).load("last.ckpt")
        assert state is not None
        assert state["accountant"]["history"] == [(2.0, 16 / 60, stop)]
    train(config, Launch(out=paused, verbose=False))
    assert_same_weights(whole, paused)
    assert without_times(whole) == without_times(paused)


def test_killed_run_ends_with_the_same_weights_and_epsilon(tmp_path: Path) -> None:
    """Between two checkpoints, so that the steps since the first are taken again."""
    config, whole, killed = small(epochs=12, epsilon=4.0), tmp_path / "whole", tmp_path / "killed"
    options = {**SMALL, "epochs": 12, "epsilon": 4.0, "accelerator": "cpu", "out": killed}
    options |= {"model_options": '{"width": 0.0625}'}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "kernelnorm", "train", "digits-vgg8", "--private", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for((killed / "last.ckpt").exists)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert len(RunFolder(killed).read_metrics()) < 12
    train(config, Launch(out=killed, accelerator="cpu", verbose=False))
    train(config, Launch(out=whole, accelerator="cpu", verbose=False))
    assert_same_weights(whole, killed)
    assert without_times(whole) == without_times(killed)
    assert RunFolder(killed).read_metrics()[-1]["epsilon"] <= 4.0


@known
def test_averaged_weights_are_tested_and_saved_for_use(tmp_path: Path) -> None:
    config = small("group", ema=0.9)
    folder = train(config, Launch(out=tmp_path, verbose=False))
    state, last = folder.load("last.ckpt"), folder.read_metrics()[-1]
    assert state is not None
    assert any(not torch.equal(x, state["trained"][name]) for name, x in state["model"].items())
    (score,) = evaluate(tmp_path, accelerator="cpu")
    assert (score.loss, score.accuracy) == pytest.approx((last["test_loss"], last["test_accuracy"]))


@known
def test_another_account_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 3.0)
    with pytest.raises(RunError, match=r"does not fit this run .*noise multiplier and sampling"):
        train(small(), Launch(out=tmp_path, verbose=False))


@known
@pytest.mark.parametrize("steps", [3, None])
def test_a_private_run_cannot_be_extended(steps: int | None, tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=steps, verbose=False))
    with pytest.raises(RunError, match=r"private run of 2 epochs.* cannot be extended to 3.*--out"):
        train(small(epochs=3), Launch(out=tmp_path))


@known
def test_other_options_are_another_run(tmp_path: Path) -> None:
    train(small(), Launch(out=tmp_path, max_steps=1, verbose=False))
    with pytest.raises(RunError, match=r"another run: private epsilon is 8.0 there and 3.0 here\."):
        train(small(epsilon=3.0), Launch(out=tmp_path))
    with pytest.raises(RunError, match="another run: private is True there and False here; "):
        train(replace(small(), private=None), Launch(out=tmp_path))


@known
def test_report_and_comparison_tell_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = [small(norm) for norm in ("kernel", "group")]
    rows = compare(configs, tmp_path, Launch())
    assert all(isinstance(row, Row) and not row.failure for row in rows)
    assert "Differentially private: epsilon 8 at delta 1e-05" in capsys.readouterr().out
    assert "Differentially private: epsilon 8" in (tmp_path / "comparison.md").read_text()
    page = report(tmp_path).with_name("report.md").read_text()
    spent = rows[0].history[-1]["epsilon"]
    assert "## digits-vgg8, epsilon 8" in page
    assert f"spent: epsilon {spent:.2f}" in page


# Configuration and errors


def test_record_and_name() -> None:
    config = small(epsilon=3.0, ema=0.9)
    assert RunConfig.from_record(config.record()) == config
    assert config.name.startswith("kernel-b16-eps3-seed0-")
    older = config.record()
    del older["private"]["secure_mode"]
    assert RunConfig.from_record(older) == config
    assert (
        len({small(**o).name for o in ({}, {"delta": 1e-6}, {"augmentations": 2, "augment": True})})
        == 3
    )
    plain = replace(config, private=None)
    assert RunConfig.from_record({**plain.record(), "private": None}) == plain


def test_training_loss_ends_no_private_run() -> None:
    history = [{"train_loss": 1e-4}] * 6
    assert replace(small(epochs=80), private=None).finished(history)
    assert not small(epochs=80).finished(history)


@known
def test_no_statistics_of_private_images_are_used(tmp_path: Path) -> None:
    folder = train(replace(small("group"), standardise=True), Launch(out=tmp_path, max_steps=1))
    assert folder.read_config()["standardise"] == {"mean": [0.5], "std": [0.25]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "batch"},
            "norm batch cannot be trained privately: .*Choose another, such as kernel",
        ),
        ({"norm": "batch_renorm"}, "norm batch_renorm cannot be trained privately: it mixes"),
        ({"precision": "bf16-mixed"}, "needs precision 32-true, got bf16-mixed"),
        ({"augmentations": 4}, "4 augmentations of a sample.* add --augment true"),
        ({"augmentations": 0}, "augmentations must be at least 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive, got nan"),
        ({"delta": 1.0}, "delta must be between 0 and 1, got 1.0"),
        ({"ema": 1.0}, "ema must be between 0 and 1, got 1.0"),
    ],
)
def test_options_that_do_not_work_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "launch", "message"),
    [
        ({"norm": "instance"}, {}, "vgg8 with norm instance has layers that private .* Choose"),
        ({}, {"compile": True}, "leave out --compile"),
        ({}, {"devices": 2}, "runs in one process: leave out --devices"),
        ({"batch_size": 61}, {}, "a batch of 61 cannot be drawn from 60 training images"),
        ({"delta": 0.02}, {}, "--delta 0.02 guarantees nothing for 60 training images: .*1/60"),
        ({"epsilon": 1e-3}, {}, "no noise keeps 8 steps to epsilon 0.001 .* a larger --epsilon"),
    ],
)
def test_runs_that_do_not_work_are_errors(
    options: dict[str, Any], launch: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        train(small(**options), Launch(out=tmp_path, accelerator="cpu", **launch))
    assert not (tmp_path / "last.ckpt").exists()


def test_without_opacus_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kernelnorm.experiments.private")
    monkeypatch.delattr("kernelnorm.experiments.private")
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(RunError, match=r"needs opacus: pip install 'kernelnorm\[private\]'"):
        train(small(), Launch(out=tmp_path))


@known
def test_secure_mode_draws_by_torchcsprng(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcsprng", None)
    with pytest.raises(RunError, match="--secure-mode needs the package torchcsprng"):
        train(small(secure_mode=True), Launch(out=tmp_path))
    package = ModuleType("torchcsprng")
    package.create_random_device_generator = lambda _: torch.Generator().manual_seed(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcsprng", package)
    secure = steps_of(small(secure_mode=True, batch_size=6), images_of())
    assert secure.optimizer.secure_mode
    assert secure.sampling.generator(0, 0) is secure.optimizer.generator
    assert not torch.equal(secure.sampling.draw(0, 0), secure.sampling.draw(0, 0))


@pytest.mark.parametrize("option", ["--epsilon=3", "--ema=0.9", "--secure-mode"])
def test_private_options_need_private(option: str) -> None:
    name = option.split("=")[0]
    with pytest.raises(SystemExit, match=f"{name} is for private training: add --private, or"):
        cli.main(["train", option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epsilon=0", "--epsilon must be a positive number, got '0'"),
        ("--delta=1", "--delta must be a number between 0 and 1, got '1'"),
        ("--ema=x", "--ema must be a number between 0 and 1, got 'x'"),
        ("--augmentations=0", "--augmentations must be a positive integer, got '0'"),
    ],
)
def test_wrong_values(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--private", option])
    assert message in capsys.readouterr().err


def test_the_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "kernelnorm train --private --epsilon 3" in text
    for field in Privacy.__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in text
    for default in ("(default: 8)", "(default: 1e-5)", "(default: 1)"):
        assert default in text


def test_the_command_passes_the_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []

    def stop(config: RunConfig, launch: Launch) -> Iterator[None]:
        seen.append(config)
        raise RunError("stop")

    monkeypatch.setattr(trainer, "train", stop)
    options = "--epsilon=3 --delta=1e-6 --max-grad-norm=2 --ema=0.9 --micro-batch-size=8"
    with pytest.raises(SystemExit, match="stop"):
        cli.main(["train", "--private", *options.split()])
    assert seen[0].private == Privacy(
        epsilon=3.0, delta=1e-6, max_grad_norm=2.0, ema=0.9, micro_batch_size=8
    )
