"""Opacus' PrivacyEngine with one more way to compute clipped gradients: bookkeeping.

The accountant, the noise and the Poisson sampling are Opacus' own. Opacus has no public way to add
a mode, so two of its private methods are overridden.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import opacus
import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import (
    DistributedDPOptimizerFastGradientClipping,
    DPOptimizerFastGradientClipping,
)
from torch import Tensor, nn

from kernelnorm.ops.containers import tensors_in
from kernelnorm.privacy.book import Book
from kernelnorm.privacy.layers import close_book, keep_book
from kernelnorm.privacy.refusals import (
    check_options,
    check_statistics,
    layers_of,
    norms_with_statistics,
    trained_parameters,
)

__all__ = ["BookkeepingModule", "BookkeepingOptimizer", "PrivacyEngine"]

MODE = "bookkeeping"


class BookkeepingModule(AbstractGradSampleModule):  # type: ignore[misc]
    """Wraps a network: its backward pass fills a book, from which clipped gradients are computed.

    :meth:`to_standard_module` returns the network without the changes.

    Args:
        m: the network; the forward methods of its layers are replaced
        batch_first: must be ``True``
        loss_reduction: the reduction of the loss over the batch, ``"mean"`` or ``"sum"``

    Raises:
        NotImplementedError: a layer with trained parameters has an unsupported type, or shares a
            parameter; or a norm mixes samples
        RuntimeError: a norm takes statistics of the batch
        ValueError: ``batch_first`` or ``loss_reduction`` has a wrong value
    """

    def __init__(
        self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean"
    ) -> None:
        if not batch_first:
            raise ValueError("bookkeeping needs batch_first=True")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        names, norms = layers_of(m), norms_with_statistics(m)
        check_statistics(norms)
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self.book = Book(names, loss_reduction == "mean")
        self._names, self._norms = names, norms
        self._handles = [m.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer in names:
            keep_book(layer, self.book)
        self._refuse_other_gradients()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the hooks of the parameters on a copy, since copied parameters have none."""
        super().__setstate__(state)
        self._refuse_other_gradients()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check the norms, and begin a forward pass of the network if it computes gradients."""
        check_statistics(self._norms)
        if torch.is_grad_enabled():
            self.book.begin({len(x) for x in tensors_in([args, options]) if x.dim()})

    def _refuse_other_gradients(self) -> None:
        for layer, name in self._names.items():
            for p_name, parameter in trained_parameters(layer):
                hook = _NoGradient(f"{name}.{p_name}" if name else p_name)
                self._handles.append(parameter.register_hook(hook))

    def remove_hooks(self) -> None:
        """Remove all hooks and restore the forward methods of the layers."""
        self.book.clear()
        while self._handles:
            self._handles.pop().remove()
        for layer in self._names:
            close_book(layer)


class BookkeepingOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus' optimizer; it computes the sum of the clipped gradients when it steps."""

    book: Book

    def accumulate(self) -> None:
        """Add the clipped gradients of the last backward pass to the sums of the step.

        Raises:
            FloatingPointError: the gradient of a sample is not finite
        """
        bad = self.book.norms().isfinite().logical_not().nonzero().flatten().tolist()
        sums = self.book.clipped_sums(self.max_grad_norm)
        if bad:
            self._check_finite(sums.values(), f"of sample {bad[0]} of the batch")
        unknown = [tuple(p.shape) for p in sums.keys() - {*self.params}]
        if unknown:
            raise RuntimeError(
                f"the network has gradients of parameters that the optimizer does not have, of "
                f"shape {unknown[0]}: were they replaced, as load_state_dict(assign=True) does? "
                "Call make_private again"
            )
        for parameter in self.params:
            if not hasattr(parameter, "summed_grad"):
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} is trained now but was not "
                    "when the network was made private: call make_private again"
                )
            if parameter.dtype not in (torch.float32, torch.float64):
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} is in {parameter.dtype}, in "
                    "which clipped gradients would be rounded: expected float32 or float64"
                )
            gradient = sums.get(parameter)
            if gradient is None:  # the layer was not called
                gradient = torch.zeros_like(parameter)
            if parameter.summed_grad is None:
                parameter.summed_grad = gradient.to(parameter.dtype)
            else:
                parameter.summed_grad.add_(gradient)

    def _check_finite(self, gradients: Iterable[Tensor | None], whose: str) -> None:
        if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
            raise FloatingPointError(f"the gradient {whose} is not finite")

    def zero_grad(self, set_to_none: bool = False) -> None:
        """See :meth:`torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self.book.clear()


class DistributedBookkeepingOptimizer(
    BookkeepingOptimizer,
    DistributedDPOptimizerFastGradientClipping,  # type: ignore[misc]
):
    """The optimizer for several processes: Opacus adds their sums, and rank 0 adds the noise."""

    def reduce_gradients(self) -> None:
        """Add the sums of all processes; all of them raise an error if one has a bad sample."""
        super().reduce_gradients()
        super()._check_finite((p.grad for p in self.params), "of a sample")

    def _check_finite(self, gradients: Iterable[Tensor | None], whose: str) -> None:
        """Leave the check to :meth:`reduce_gradients`, so that processes stay in step."""


class PrivacyEngine(opacus.PrivacyEngine):  # type: ignore[misc]
    """Opacus' PrivacyEngine, by default with ``grad_sample_mode="bookkeeping"``.

    The other arguments, the other modes and the returned objects are those of
    :class:`opacus.PrivacyEngine`. Bookkeeping gives the gradients of ``"hooks"``, up to rounding,
    in about the time of an ordinary step. It needs flat clipping. All trained parameters must
    belong to KNConv, Conv, Linear, GroupNorm or :class:`~kernelnorm.norms.WSConv2d` layers, and
    each of these is called once in a forward pass. For other layers it raises an error with their
    names. In several processes, wrap the network in
    :class:`opacus.distributed.DifferentiallyPrivateDistributedDataParallel`.

    With ``augmentations=K``, ``K`` consecutive rows of the network's input are one sample. The
    gradient of the mean of their losses is clipped once (of their sum, with
    ``loss_reduction="sum"``). The batch size of the loader still counts samples.

    Example::

        >>> engine = PrivacyEngine(accountant="rdp")  # doctest: +SKIP
        >>> network, optimizer, loader = engine.make_private(
        ...     module=network, optimizer=optimizer, data_loader=loader,
        ...     noise_multiplier=1.0, max_grad_norm=1.0,
        ... )  # doctest: +SKIP
    """

    _prepared: BookkeepingModule | None = None

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        grad_sample_mode: str = MODE,
        augmentations: int = 1,
        **options: Any,
    ) -> tuple[Any, ...]:
        """See :meth:`opacus.PrivacyEngine.make_private`."""
        if not isinstance(augmentations, int) or augmentations < 1:
            raise ValueError(f"augmentations must be an integer of at least 1, got {augmentations}")
        if augmentations > 1 and grad_sample_mode != MODE:
            raise ValueError(
                f"augmentations={augmentations} needs grad_sample_mode={MODE!r}, got "
                f"{grad_sample_mode!r}"
            )
        if grad_sample_mode == MODE:
            for name, value in (("clipping", "flat"), ("wrap_model", True)):
                if options.get(name, value) != value:
                    raise ValueError(
                        f"grad_sample_mode={MODE!r} needs {name}={value!r}, got {options[name]!r}"
                    )
            check_options(module, optimizer, max_grad_norm, options.get("noise_multiplier"))
        try:
            made: tuple[Any, ...] = super().make_private(
                module=module,
                optimizer=optimizer,
                max_grad_norm=max_grad_norm,
                grad_sample_mode=grad_sample_mode,
                **options,
            )
        except Exception:
            if self._prepared is not None:  # so the network stays as it was
                self._prepared.to_standard_module()
            raise
        finally:
            self._prepared = None
        if grad_sample_mode == MODE:
            network, steps, _ = made
            steps.book = network.book
            network.book.augmentations = augmentations
        return made

    def make_private_with_epsilon(
        self, *, grad_sample_mode: str = MODE, **options: Any
    ) -> tuple[Any, ...]:
        """See :meth:`opacus.PrivacyEngine.make_private_with_epsilon`."""
        result: tuple[Any, ...] = super().make_private_with_epsilon(
            grad_sample_mode=grad_sample_mode, **options
        )
        return result

    def _prepare_model(self, module: nn.Module, **options: Any) -> Any:
        self.validate(module=module, optimizer=None, data_loader=None)
        if options.get("grad_sample_mode") != MODE:
            norms = norms_with_statistics(module)
            check_statistics(norms)
            network = super()._prepare_model(module, **options)
            network.register_forward_pre_hook(partial(_check_before_forward, norms))
            return network
        if isinstance(module, BookkeepingModule):
            module = module.to_standard_module()
        self._prepared = BookkeepingModule(
            module, batch_first=options["batch_first"], loss_reduction=options["loss_reduction"]
        )
        return self._prepared

    def _prepare_optimizer(self, *, grad_sample_mode: str = MODE, **options: Any) -> Any:
        if grad_sample_mode != MODE:
            return super()._prepare_optimizer(grad_sample_mode=grad_sample_mode, **options)
        distributed = options.pop("distributed", False)
        kind = DistributedBookkeepingOptimizer if distributed else BookkeepingOptimizer
        options.pop("clipping", None)
        optimizer = options.pop("optimizer")
        if isinstance(optimizer, opacus.optimizers.DPOptimizer):
            optimizer = optimizer.original_optimizer
        generator = self.secure_rng if self.secure_mode else options.pop("noise_generator", None)
        options.pop("noise_generator", None)
        return kind(optimizer, generator=generator, secure_mode=self.secure_mode, **options)


def _check_before_forward(norms: dict[nn.Module, str], *_: Any) -> None:
    check_statistics(norms)


class _NoGradient:
    """A hook that raises if autograd computes a gradient of a parameter: the book lacks that."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            raise RuntimeError(
                f"parameter {self.name!r} is used outside of its layer, where its gradient cannot "
                "be clipped"
            )
