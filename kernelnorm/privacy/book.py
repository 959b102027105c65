"""The book of a private step: the gradients of all layers, from the backward pass to the step.

In the backward pass each layer enters the norms of its gradients, one per sample. From the norms
of all layers follow the factors that clip the samples. With these factors the book computes the sum
of the clipped gradients of each layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from kernelnorm.ops.observers import version, without_autocast
from kernelnorm.privacy import gradients
from kernelnorm.privacy.product import Product
from kernelnorm.privacy.standardised import Standardisation


class Entry(Protocol):
    """The gradients of a layer's parameters in one backward pass."""

    squared_norms: Tensor
    """Shape :math:`(N,)`: over all parameters of the layer that are trained."""

    def weighted_sums(self, weights: Tensor) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """For each parameter the sum of the samples' gradients, each times its weight."""


class Vectors:
    """Gradients that are stored for each sample, since they are small.

    Shape:
        - each gradient: :math:`(N, *)`, with the shape of its parameter after the first dimension
    """

    def __init__(self, of: dict[nn.Parameter, Tensor]) -> None:
        self.of = of
        norms = [gradients.squares(gradient) for gradient in of.values()]
        self.squared_norms = torch.stack(norms).sum(0)

    def weighted_sums(self, weights: Tensor) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """See :class:`Entry`."""
        for parameter, gradient in self.of.items():
            total = weights.to(gradient) @ gradient.flatten(1)
            yield parameter, total.view(parameter.shape)


class Weight:
    """The gradient of a weight, stored as the two factors of its :class:`Product`."""

    def __init__(
        self, parameter: nn.Parameter, product: Product, standardised: Standardisation | None
    ) -> None:
        self.parameter, self.product, self.standardised = parameter, product, standardised
        self.squared_norms = gradients.squared_norms(product, standardised)
        self._versions = _versions(product)

    def weighted_sums(self, weights: Tensor) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """See :class:`Entry`."""
        if _versions(self.product) != self._versions:
            raise RuntimeError(
                "the input of a layer was changed in place between backward() and "
                "optimizer.step(), which needs it: change it afterwards. The layer has a weight of "
                f"shape {tuple(self.parameter.shape)}"
            )
        total = gradients.weighted_sum(self.product, weights).view(self.parameter.shape)
        if self.standardised is not None:
            total = self.standardised.back_(total.unsqueeze(0)).squeeze(0)
        yield self.parameter, total


def _versions(product: Product) -> tuple[int, int]:
    return version(product.x), version(product.z)


def weight_entry(
    parameter: nn.Parameter, product: Product, standardised: Standardisation | None = None
) -> Entry:
    """The entry of a weight, of the kind that takes less time and memory.

    Args:
        standardised: the standardisation, if the filters are not the weight itself
    """
    if gradients.is_kept(product):
        return Vectors({parameter: gradients.per_sample(product, standardised)})
    return Weight(parameter, product, standardised)


class Page:
    """The calls of one forward pass; its backward pass fills the book.

    Args:
        book: the book that the page belongs to
        rows: the sizes of the first dimensions of all tensors among the network's inputs
    """

    def __init__(self, book: Book, rows: set[int]) -> None:
        self.book, self.rows, self.augmentations = book, rows, book.augmentations
        self._called: set[nn.Module] = set()

    def call(self, layer: nn.Module, input: Tensor) -> None:
        """Record a call of a layer, and raise if it is the second one."""
        name = self.book.names[layer]
        if len(input) % self.augmentations:
            raise ValueError(
                f"layer {name!r} got a batch of {len(input)} rows, expected a multiple of "
                f"augmentations={self.augmentations}: consecutive rows are a sample"
            )
        if layer in self._called:
            raise NotImplementedError(
                f"layer {name!r} is called more than once in a forward pass, which bookkeeping "
                'does not support: use grad_sample_mode="hooks", or use_reentrant=True if '
                "activation checkpointing repeats the call"
            )
        self._called.add(layer)

    def enter(self, layer: nn.Module, entries: list[Entry]) -> None:
        """Store the entries of a layer in the backward pass; a frozen layer has none."""
        self.book.enter(self, layer, entries)


class Book:
    """The entries of all layers of a network in one step.

    Args:
        names: the name of each layer with trained parameters
        mean: True if the loss is the mean over the batch, False if it is the sum

    Attributes:
        augmentations: the number of consecutive rows of a batch that make a sample (default: 1).
            The gradient of a sample is that of the mean of their losses (of their sum, if the loss
            is the sum over the batch)
        page: the page of the last forward pass, or of the gradients that were entered
    """

    def __init__(self, names: dict[nn.Module, str], mean: bool) -> None:
        self.augmentations = 1
        self.names, self._mean = names, mean
        self._entries: dict[nn.Module, list[Entry]] = {}
        self.page = Page(self, set())

    def begin(self, rows: set[int]) -> None:
        """Start a forward pass.

        Args:
            rows: the sizes of the first dimensions of all tensors among the network's inputs
        """
        if self._entries:
            raise RuntimeError(
                "a second forward pass before optimizer.step(): gradients cannot be accumulated. "
                "Call optimizer.step() and optimizer.zero_grad() after each backward pass; for "
                "batches larger than the memory use opacus.utils.batch_memory_manager"
            )
        self.page = Page(self, rows)

    def enter(self, page: Page, layer: nn.Module, entries: list[Entry]) -> None:
        """Store the entries of a layer, which was called in the forward pass of ``page``."""
        if torch.is_grad_enabled():
            raise NotImplementedError("private training takes no backward(create_graph=True)")
        if self._entries and page is not self.page:
            raise RuntimeError(
                f"the backward pass through layer {self.names[layer]!r} is of another forward pass "
                "than the gradients so far: a step takes one forward and one backward pass. "
                "Concatenate the inputs, or give the network all of them in one call"
            )
        self.page = page
        if layer in self._entries:
            raise RuntimeError(
                f"a second backward pass through layer {self.names[layer]!r} before "
                "optimizer.step(): gradients cannot be accumulated"
            )
        if entries:
            self._entries[layer] = entries

    def norms(self) -> Tensor:
        """The norm of each sample's gradient over all parameters, shape :math:`(N,)`."""
        sizes = {
            self.names[layer]: len(entries[0].squared_norms)
            for layer, entries in self._entries.items()
        }
        if len({*sizes.values()}) != 1:
            raise RuntimeError(
                "expected the gradients of a backward pass, with one batch size in all layers, got "
                f"{sizes}"
            )
        (samples,) = {*sizes.values()}
        if not self.page.rows:
            raise RuntimeError(
                "found no tensor among the network's inputs, so it is not known what the samples "
                "are: give tensors, or lists, tuples, dicts or dataclasses of them"
            )
        if self.page.rows != {samples * self.augmentations}:
            raise RuntimeError(
                f"the network got batches of {sorted(self.page.rows)}, and its layers batches of "
                f"{samples * self.augmentations}: their rows are not the rows of its input, so "
                "samples cannot be clipped"
            )
        norms = [entry.squared_norms for entries in self._entries.values() for entry in entries]
        total = torch.stack([norm.to(norms[0]) for norm in norms]).sum(0).sqrt()
        return total * samples if self._mean else total

    def clipped_sums(self, max_norm: float) -> dict[nn.Parameter, Tensor]:
        """The sum over the samples of their gradients, clipped to ``max_norm``; empties the book.

        The gradient of each sample is multiplied by
        :math:`\\min(1, \\text{max\\_norm} / (\\text{norm} + 10^{-6}))`, as Opacus does it.

        If the norm of a finite gradient overflows, the sample does not count.
        """
        norms = self.norms()
        weights = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if self._mean:
            weights = weights * len(weights)
        sums: dict[nn.Parameter, Tensor] = {}
        while self._entries:  # releases each entry before the next sum
            _, entries = self._entries.popitem()
            with without_autocast(weights):  # which would round the clipped gradients
                for entry in entries:
                    sums.update(entry.weighted_sums(weights))
        return sums

    def clear(self) -> None:
        """Release all entries."""
        self._entries.clear()
