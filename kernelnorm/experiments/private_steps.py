"""Private steps: Poisson batches, clipped gradients, noise and privacy accounting.

Sampling, noise, optimizer and accountant are Opacus'; the clipped gradients are those of
:mod:`kernelnorm.privacy`. Except in secure mode, batches and noise are functions of the run and the
step: a run that resumes within an epoch repeats exactly the steps after its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import opacus
import torch
import torch.nn.functional as F
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kernelnorm
from kernelnorm.experiments.account import Account, noise_multiplier
from kernelnorm.experiments.config import RunConfig
from kernelnorm.experiments.data import Images
from kernelnorm.experiments.data.poisson import PoissonSampling
from kernelnorm.experiments.errors import RunError
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.private_options import Privacy
from kernelnorm.experiments.runs import Metrics
from kernelnorm.experiments.steps import Material, forward, make_optimizer
from kernelnorm.privacy.engine import BookkeepingModule, BookkeepingOptimizer

__all__ = ["PrivateSteps", "check"]


def check(config: RunConfig, launch: Launch, network: nn.Module) -> None:
    """Check that a network can be trained privately, before anything is loaded or written.

    Args:
        config: the run's configuration.
        launch: where and how the run is executed.
        network: one with the run's layers; it may be on the device ``"meta"``.

    Raises:
        RunError: it cannot be trained privately.
    """
    if launch.devices > 1 or torch.distributed.is_torchelastic_launched():
        raise RunError("private training runs in one process: leave out --devices and torchrun")
    if launch.compile:
        raise RunError("private training does not take compiled networks: leave out --compile")
    if config.private is not None and config.private.secure_mode:
        _secure_generator()
    try:
        ModuleValidator.validate(network, strict=True)
        BookkeepingModule(network)
    except (NotImplementedError, UnsupportedModuleError) as error:
        raise RunError(
            f"{config.model} with norm {config.norm} has layers that private training does not "
            "know. Choose another norm: kernel, group, layer, ws_group, lrn or none"
        ) from error


class Batch(NamedTuple):
    """A Poisson batch, which is drawn when the step is taken."""

    epoch: int
    step: int


class Seeds:
    """Seeds of the batch and of the noise of each step, all of them different within a run.

    They depend on the configuration (except the names of case and dataset), the images, the noise
    multiplier and the versions of the packages. Two runs with the same noise would reveal it: the
    difference of their weights would cancel it or allow to compute it. Two runs of T steps share
    the noise of a step with a probability of about 2 T / 2**32.
    """

    def __init__(self, config: RunConfig, images: Images, per_epoch: int, noise: float) -> None:
        record = {k: v for k, v in config.as_dict().items() if k not in ("case", "dataset")}
        versions = kernelnorm.__version__, opacus.__version__, torch.__version__
        pixels = images.fingerprint(whole=True)
        text = f"{json.dumps(record, sort_keys=True)} {pixels} {noise} {versions}"
        self.first = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        self.per_epoch = per_epoch

    def of(self, what: Literal["batch", "noise"], epoch: int, step: int) -> int:
        """Return a seed below 2**32: generators on CPUs use only 32 bits of a seed."""
        number = 2 * (epoch * self.per_epoch + step) + (what == "noise")
        return (self.first + number) % (1 << 32)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: it would round a gradient's norm and the clipped gradient differently."""
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


class PrivateSteps:
    """Steps of DP-SGD; see :class:`kernelnorm.experiments.steps.Steps`.

    Raises:
        RunError: the options do not fit the images or the device, no noise keeps to the budget, or
            secure mode lacks torchcsprng.
    """

    def __init__(self, material: Material) -> None:
        config, images, network = material.config, material.images, material.network
        assert config.private is not None
        self.privacy, self.config, self.network = config.private, config, network
        self.device = material.fabric.device
        _check_images(config, self.privacy, len(images), self.device)
        self.per_epoch = max(1, round(len(images) / config.batch_size))
        rate = config.batch_size / len(images)
        self.account = Account(
            noise_multiplier(self.privacy, rate, config.epochs * self.per_epoch),
            rate,
            self.privacy.delta,
        )
        secure = _secure_generator() if self.privacy.secure_mode else None
        self.seeds = seeds = Seeds(config, images, self.per_epoch, self.account.noise)

        def generator(epoch: int, step: int) -> torch.Generator:
            return secure or torch.Generator().manual_seed(seeds.of("batch", epoch, step))

        self.sampling = PoissonSampling(
            images=images,
            rate=rate,
            generator=generator,
            seed=config.seed,
            views=self.privacy.augmentations,
            augment=material.augment,
            preprocess=material.preprocess,
            device=self.device,
        )
        network.to(self.device)
        self.averaged = _average(network, self.privacy.ema) if self.privacy.ema else None
        self.evaluated = network if self.averaged is None else self.averaged.module
        self.model = BookkeepingModule(network, loss_reduction="sum")
        self.model.book.augmentations = self.privacy.augmentations
        self.optimizer = BookkeepingOptimizer(
            make_optimizer(network, config),
            noise_multiplier=self.account.noise,
            max_grad_norm=self.privacy.max_grad_norm,
            expected_batch_size=config.batch_size,
            generator=secure or torch.Generator(self.device),
            secure_mode=self.privacy.secure_mode,
        )
        self.optimizer.book = self.model.book
        hook = self.account.accountant.get_optimizer_hook_fn(sample_rate=rate)
        self.optimizer.attach_step_hook(hook)

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """See :class:`kernelnorm.experiments.steps.Steps`."""
        return (Batch(epoch, step) for step in range(start_step, self.per_epoch))

    @_full_precision()
    def take(self, batch: Batch) -> tuple[Tensor, int]:
        """See :class:`kernelnorm.experiments.steps.Steps`.

        Raises:
            RunError: the step would exceed the budget; it is not taken.
        """
        self._check_budget()
        views = self.privacy.augmentations
        sums, images = torch.zeros(2, device=self.device), 0
        for x, y, last in self.sampling.parts(*batch, self.privacy.micro_batch_size):
            logits = forward(self.model, x, self.config)
            # The sum over samples of the mean over their views
            loss = F.cross_entropy(logits, y, reduction="sum") / views
            loss.backward()
            if last:
                self._seed_noise(batch)
            else:
                self.optimizer.signal_skip_step()  # only adds to the sum of clipped gradients
            self.optimizer.step()
            self.optimizer.zero_grad()
            correct = (logits.argmax(1) == y).sum() / views
            sums += torch.stack([loss.detach(), correct])
            images += len(y) // views
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return sums, images

    def _check_budget(self) -> None:
        spent = self.account.epsilon(more=1)
        if spent > self.privacy.epsilon:
            raise RunError(
                f"the privacy budget is spent: {self.account.steps} steps have an epsilon of "
                f"{self.account.epsilon():.4f}, and one more would have {spent:.4f}, above "
                f"--epsilon {self.privacy.epsilon:g}"
            )

    def _seed_noise(self, batch: Batch) -> None:
        if not self.privacy.secure_mode:
            self.optimizer.generator.manual_seed(self.seeds.of("noise", *batch))

    def metrics(self) -> Metrics:
        """See :class:`kernelnorm.experiments.steps.Steps`."""
        return {"epsilon": self.account.epsilon()}

    def record(self) -> dict[str, Any]:
        """See :class:`kernelnorm.experiments.steps.Steps`."""
        return {
            "privacy": {
                "noise_multiplier": self.account.noise,
                "sampling_rate": self.account.rate,
                "steps": self.config.epochs * self.per_epoch,
                "accountant": self.account.accountant.mechanism(),
                "opacus": opacus.__version__,
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """See :class:`kernelnorm.experiments.steps.Steps`."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "accountant": dict(self.account.accountant.state_dict()),
        }
        if self.averaged is not None:
            state["trained"] = self.network.state_dict()
            state["averaged_steps"] = self.averaged.n_averaged
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`kernelnorm.experiments.steps.Steps`."""
        self.evaluated.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.account.load_state_dict(state["accountant"])
        if self.averaged is not None:
            self.network.load_state_dict(state["trained"])
            self.averaged.n_averaged.copy_(state["averaged_steps"])


def _check_images(config: RunConfig, privacy: Privacy, images: int, device: torch.device) -> None:
    if device.type == "mps":
        raise RunError("private training needs float64, which MPS lacks: add --accelerator cpu")
    if config.batch_size > images:
        raise RunError(
            f"a batch of {config.batch_size} cannot be drawn from {images} training images: "
            "choose a smaller --batch-size"
        )
    if privacy.delta * images >= 1:
        raise RunError(
            f"--delta {privacy.delta:g} guarantees nothing for {images} training images: choose "
            f"one well below 1/{images}"
        )


def _average(network: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a network whose weights are the moving average of the network's.

    Step 0 copies the weights. In step t > 0 the decay is at most (1 + t) / (10 + t), so that the
    average soon forgets the first weights, which are almost random.
    """

    def average(mean: Tensor, weight: Tensor, steps: Tensor | int) -> Tensor:
        now = min(decay, (1 + int(steps)) / (10 + int(steps)))
        return mean + (1 - now) * (weight - mean)

    return AveragedModel(network, avg_fn=average)


def _secure_generator() -> torch.Generator:
    """Return Opacus' generator of secure random numbers."""
    try:
        generator: torch.Generator = opacus.PrivacyEngine(secure_mode=True).secure_rng
    except ImportError as error:
        raise RunError(
            "--secure-mode needs the package torchcsprng, which is not installed. Without "
            "--secure-mode a run is fit for research, not for a release"
        ) from error
    return generator
