"""Arguments of the functions that are refused: each error names the argument and its value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernelnorm.functional import kernel_norm, kn_conv

GOOD = {"input": torch.randn(2, 4, 8, 8), "weight": torch.randn(6, 4, 3, 3)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 4, 8)}, ValueError, r"input must have 4 channels .*got 2"),
        ({"input": torch.randn(4, 8)}, ValueError, r"input must have 4 dim.*3 without.*\(4, 8\)"),
        ({"input": torch.ones(2, 4, 8, 8, dtype=torch.int)}, TypeError, r"input.*torch\.int32"),
        (
            {"input": np.ones((2, 4, 8, 8))},
            TypeError,
            r"input must be .*Tensor, got ndarray",
        ),
        ({"input": torch.eye(3).to_sparse()}, TypeError, r"input must be a dense .*sparse_coo"),
        ({"input": GOOD["input"].to(torch.float8_e5m2)}, TypeError, r"input must .*float8_e5m2"),
        ({"weight": None}, TypeError, r"weight must be a torch\.Tensor, got NoneType"),
        ({"bias": 1.0}, TypeError, r"bias must be a torch\.Tensor, got float"),
        ({"groups": "2"}, ValueError, r"groups must be a positive integer .*got '2'"),
        ({"groups": True}, ValueError, r"groups must be a positive integer .*got True"),
        ({"stride": True}, ValueError, r"stride must be an integer of at least 1.*got True"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p must be a number, got '0\.1'"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, r"dropout_p must be a number, got tensor"),
        ({"eps": None}, TypeError, r"eps must be a number, got None"),
        ({"eps": 1e-320}, ValueError, r"eps must be at least 1\.2e-38 and finite, got 1e-320"),
        ({"input": [[1.0]]}, TypeError, r"input must be a torch\.Tensor, got list"),
        (
            {"input": torch.ones(2, 4, 8, 8) * 1j},
            TypeError,
            r"input must be in float32, .*complex64",
        ),
        ({"input": torch.randn(2, 5, 8, 8)}, ValueError, r"input must have 4 channels.* got 5"),
        ({"input": GOOD["input"].double()}, TypeError, r"dtype, got input torch\.float64, weight"),
        ({"weight": torch.randn(6, 4)}, ValueError, r"weight must be for 1, 2 or 3.*\(6, 4\)"),
        ({"weight": GOOD["weight"].long()}, TypeError, r"weight must be in float32, .*int64"),
        (
            {"input": torch.randn(2, 0, 8, 8), "weight": torch.randn(6, 0, 3, 3)},
            ValueError,
            r"weight must have at least 1 input channel, got shape \(6, 0, 3, 3\)",
        ),
        ({"bias": torch.randn(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"bias": torch.randn(6).double()}, TypeError, r"bias torch\.float64"),
        (
            {"groups": 0},
            ValueError,
            r"groups must be a positive integer that divides the 6 .*got 0",
        ),
        ({"groups": 4}, ValueError, r"groups must be .* that divides the 6 .*got 4"),
        ({"stride": 0}, ValueError, r"stride must be an integer of at least 1.*got 0"),
        ({"stride": 2**56}, ValueError, r"stride must be .*below 2\*\*31.*got 720"),
        ({"dilation": 2**62}, ValueError, r"dilation must be .*below 2\*\*31.*got 461"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be .* or 2 of them, got \(1, 2, 3\)"),
        ({"padding": -1}, ValueError, r"padding must be an integer of at least 0.*got -1"),
        ({"padding": "full"}, ValueError, r"padding must be 'same', 'valid' or.*got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, r"padding='same' needs a stride of 1"),
        ({"dilation": 0}, ValueError, r"dilation must be an integer of at least 1.*got 0"),
        ({"dilation": 5}, ValueError, r"kernel_size \(3, 3\) with dilation \(5, 5\).*11 against 8"),
        ({"padding_mode": "wrap"}, ValueError, r"padding_mode must be one of .*got 'wrap'"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be at least 0 and below 1, got 1\.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be .*got -0\.1"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be .*got nan"),
        ({"eps": 0.0}, ValueError, r"eps must be at least 1\.2e-38 and finite, got 0\.0"),
        ({"activation": "gelu"}, ValueError, r"activation must be None, .*got 'gelu'"),
        ({"negative_slope": 0.0}, ValueError, r"negative_slope must be from 0.001 to 1, got 0.0"),
        ({"evaluation": "mean"}, ValueError, r"evaluation must be one of .*got 'mean'"),
    ],
)
def test_kn_conv_errors(change, error, message):
    with pytest.raises(error, match=message):
        kn_conv(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, r"input must be.*uint8"),
        (
            {"input": np.ones((2, 3, 4, 4))},
            TypeError,
            r"input must be .*Tensor, got ndarray",
        ),
        (
            {"input": torch.randn(4, 4)},
            ValueError,
            r"input must be for 1, 2 or 3.*\(4, 4\)",
        ),
        ({"kernel_size": (3, 3, 3, 3)}, ValueError, r"kernel_size must be for 1, 2 or 3"),
        ({"kernel_size": 0}, ValueError, r"kernel_size must be an integer of at least 1.*got 0"),
        ({"kernel_size": 5}, ValueError, r"kernel_size \(5, 5\).*5 against 4 pixels"),
        ({"stride": 0}, ValueError, r"stride must be an integer of at least 1"),
        ({"padding": -1}, ValueError, r"padding must be an integer of at least 0"),
        ({"padding": "same"}, ValueError, r"padding must be an integer .* got 'same'"),
        ({"dropout_p": 2}, ValueError, r"dropout_p must be .*got 2"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 1\.2e-38 .*got -1\.0"),
        ({"evaluation": ""}, ValueError, r"evaluation must be one of"),
    ],
)
def test_kernel_norm_errors(change, error, message):
    with pytest.raises(error, match=message):
        kernel_norm(**{"input": torch.randn(2, 3, 4, 4), "kernel_size": 2, **change})


def test_a_number_that_equals_a_valid_one_is_checked_again() -> None:
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    kn_conv(x, weight, stride=1)
    with pytest.raises(ValueError, match=r"stride must be .*got 1\.0"):
        kn_conv(x, weight, stride=1.0)  # type: ignore[arg-type]


def test_a_tensor_that_has_changed_is_read_again() -> None:
    x, weight, stride = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.tensor([1, 1])
    shapes = []
    for step in (1, 2):
        stride.fill_(step)
        given = stride, (stride[0], stride[1])
        shapes += [kn_conv(x, weight, stride=s).shape[2] for s in given]  # type: ignore[arg-type]
    assert shapes == [6, 6, 3, 3]
