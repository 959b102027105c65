"""The primitives of a KNConv as Triton kernels; the formulas are those of the eager backend.

A program takes a block of pixels and goes through their channels, a block at a time, so that sums
over channels stay in registers and each large tensor is read once. Large tensors come as a pointer
and three strides: samples, pixels, channels. Maps and vectors are contiguous. ``volume`` is the
number of pixels of one image. ``pixels`` is the same number or, where one stride leads through the
pixels of all samples, the number of pixels of all samples, which then count as one sample.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from kernelnorm.ops.backends.triton.device_functions import (
    accumulator,
    block_of_channels,
    block_of_pixels,
    double,
    is_kept,
    jit,
    keep,
    keys_of_pixels,
    tl,
)


@jit
def pixel_statistics(
    x, x_n, x_p, x_c, keys, threshold, maps, samples, size_0, size_1, size_2,
    size, pixels, channels,
    DIMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and mean square over the channels of each pixel: two maps.

    Sums the differences to the pixel's first channel, which are small, and adds this channel
    afterwards. A first channel that the mask drops counts as zero.
    """
    sample, pixel, exists, place = block_of_pixels(pixels, BLOCK_P)
    rows = x + sample * x_n + pixel * x_p
    first = accumulator(tl.load(rows, exists, 0))
    total = tl.zeros_like(first)
    square = tl.zeros_like(first)
    kept = tl.zeros_like(first)
    if keys is not None:
        pixel_keys = keys_of_pixels(
            keys, place, exists, channels, samples, size_0, size_1, size_2, DIMS
        )
        first = tl.where(is_kept(pixel_keys * (tl.load(keys) | 1), threshold), first, 0)
    for start in range(0, channels, BLOCK_C):
        channel, valid, inside = block_of_channels(start, channels, exists, BLOCK_C)
        value = accumulator(tl.load(rows[:, None] + channel[None, :] * x_c, inside, 0))
        difference = tl.where(inside, value - first[:, None], 0)
        if keys is not None:
            channel_keys = tl.load(keys + channel, valid, 0)
            mask = (inside & keep(pixel_keys, channel_keys, threshold)).to(first.dtype)
            difference *= mask
            kept += tl.sum(mask, 1)
        total += tl.sum(difference, 1)
        square += tl.sum(difference * difference, 1)
    base = first.to(tl.float64)
    shift = base
    if keys is not None:
        shift = base * (kept.to(tl.float64) / channels)
    mean = total.to(tl.float64) / channels
    tl.store(maps + place, mean + shift, exists)
    tl.store(
        maps + size + place, square.to(tl.float64) / channels + (2 * mean + shift) * base, exists
    )


@jit
def window_statistics(
    maps, mu, rstd, mean_factor, square_factor, eps, size, count,
    size_0, size_1, size_2, positions_0, positions_1, positions_2,
    kernel_0, kernel_1, kernel_2, stride_0, stride_1, stride_2,
    padding_0, padding_1, padding_2, dilation_0, dilation_1, dilation_2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and inverse standard deviation of each window, from the maps of the pixels."""
    window = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = window < count
    w_0 = window % positions_2 * stride_2 - padding_2
    h_0 = window // positions_2 % positions_1 * stride_1 - padding_1
    rest = window // positions_2 // positions_1
    d_0 = rest % positions_0 * stride_0 - padding_0
    image = rest // positions_0 * size_0
    mean = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for i in range(kernel_0):
        d = d_0 + i * dilation_0
        for j in range(kernel_1):
            h = h_0 + j * dilation_1
            inside = exists & (d >= 0) & (d < size_0) & (h >= 0) & (h < size_1)
            row = ((image + d) * size_1 + h) * size_2
            for k in range(kernel_2):
                w = w_0 + k * dilation_2
                valid = inside & (w >= 0) & (w < size_2)
                mean += tl.load(maps + row + w, valid, 0)
                square += tl.load(maps + size + row + w, valid, 0)
    mean *= double(mean_factor)
    var = square * double(square_factor) - mean * mean
    var = tl.where(var < 0, 0, var)
    tl.store(mu + window, mean, exists)
    tl.store(rstd + window, 1 / tl.sqrt(tl.where(exists, var + double(eps), 1)), exists)


@jit
def epilogue(
    z, z_n, z_p, z_c, y, y_n, y_p, y_c,
    map_1, vector_1, map_2, vector_2, rstd, bias,
    size, pixels, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Write the output to ``y`` and, if ``SLOPE`` is ``None``, the numerator to ``z``."""
    sample, pixel, exists, place = block_of_pixels(pixels, BLOCK_P)
    z += sample * z_n + pixel * z_p
    y += sample * y_n + pixel * y_p
    scale = tl.load(rstd + place, exists, 0)
    first = tl.load(map_1 + place, exists, 0)
    if map_2 is not None:
        second = tl.load(map_2 + place, exists, 0)
    for start in range(0, channels, BLOCK_C):
        channel, valid, inside = block_of_channels(start, channels, exists, BLOCK_C)
        at = z[:, None] + channel[None, :] * z_c
        numerator = tl.load(at, inside, 0).to(scale.dtype)
        numerator -= first[:, None] * tl.load(vector_1 + channel, valid, 0)[None, :]
        if map_2 is not None:
            numerator -= second[:, None] * tl.load(vector_2 + channel, valid, 0)[None, :]
        output = numerator * scale[:, None]
        if bias is not None:
            output += tl.load(bias + channel, valid, 0).to(scale.dtype)[None, :]
        if SLOPE is None:
            tl.store(at, numerator, inside)
        elif SLOPE == 0:
            output = tl.where(output < 0, 0, output)  # unlike a maximum, it keeps NaN
        else:
            output = tl.where(output < 0, output * SLOPE, output)
        tl.store(y[:, None] + channel[None, :] * y_c, output, inside)


@jit
def epilogue_backward(
    kept, kept_n, kept_p, kept_c,
    grad, grad_n, grad_p, grad_c,
    grad_z, grad_z_n, grad_z_p, grad_z_c,
    rstd, mu, filter_sums, bias, grad_mean_factor, grad_var_factor, pair, parts,
    volume, size, pixels, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Write ``grad_z`` and ``pair``; each program also writes its part of the sums over pixels."""
    sample, pixel, exists, place = block_of_pixels(pixels, BLOCK_P)
    kept += sample * kept_n + pixel * kept_p
    grad += sample * grad_n + pixel * grad_p
    grad_z += sample * grad_z_n + pixel * grad_z_p
    part = parts + tl.program_id(0).to(tl.int64) * channels
    other_part = part + tl.num_programs(0).to(tl.int64) * channels
    scale = tl.load(rstd + place, exists, 1)
    mean = tl.load(mu + place, exists, 0)
    with_kept = tl.zeros_like(scale)
    with_bias = tl.zeros_like(scale)
    with_sums = tl.zeros_like(scale)
    for start in range(0, channels, BLOCK_C):
        channel, valid, inside = block_of_channels(start, channels, exists, BLOCK_C)
        k = tl.load(kept[:, None] + channel[None, :] * kept_c, inside, 0).to(scale.dtype)
        g = tl.load(grad[:, None] + channel[None, :] * grad_c, inside, 0).to(scale.dtype)
        if SLOPE is not None:
            if SLOPE == 0:
                g = tl.where(k <= 0, 0, g)
            else:
                g = tl.where(k <= 0, g * SLOPE, g)
                k = tl.where(k < 0, k / SLOPE, k)
            if bias is not None:
                of_bias = tl.load(bias + channel, valid, 0).to(scale.dtype)
                with_bias += tl.sum(g * of_bias[None, :], 1)
        with_kept += tl.sum(g * k, 1)
        with_sums += tl.sum(g * tl.load(filter_sums + channel, valid, 0)[None, :], 1)
        of_z = (g * scale[:, None]).to(grad_z.dtype.element_ty)
        tl.store(grad_z[:, None] + channel[None, :] * grad_z_c, of_z, inside)
        tl.store(part + channel, tl.sum(g, 0), valid)
        tl.store(other_part + channel, tl.sum(of_z.to(scale.dtype) * mean[:, None], 0), valid)
    grad_rstd = with_kept
    if SLOPE is not None:
        grad_rstd = (with_kept - with_bias) / scale
    grad_var = -0.5 * scale * scale * scale * grad_rstd
    grad_mean = -scale * with_sums - 2 * mean * grad_var
    at = pair + (place + place // volume * volume)  # (samples, 2, volume)
    tl.store(at, grad_mean * double(grad_mean_factor), exists)
    tl.store(at + volume, grad_var * double(grad_var_factor), exists)


@jit
def statistics_backward(
    x, x_n, x_p, x_c, grad, grad_n, grad_p, grad_c,
    pair, keys, threshold, samples,
    size_0, size_1, size_2, positions_0, positions_1, positions_2,
    kernel_0, kernel_1, kernel_2, stride_0, stride_1, stride_2,
    padding_0, padding_1, padding_2, dilation_0, dilation_1, dilation_2,
    size, pixels, channels,
    DIMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum ``pair`` over the windows that contain each pixel; add to ``grad`` in place."""
    sample, pixel, exists, place = block_of_pixels(pixels, BLOCK_P)
    x += sample * x_n + pixel * x_p
    grad += sample * grad_n + pixel * grad_p
    windows = positions_0 * positions_1 * positions_2
    w_0 = place % size_2 + padding_2
    h_0 = place // size_2 % size_1 + padding_1
    rest = place // size_2 // size_1
    d_0 = rest % size_0 + padding_0
    image = pair + rest // size_0 * 2 * windows
    a = tl.load(image, exists & False, 0)
    b = tl.zeros_like(a)
    for i in range(kernel_0):
        d = d_0 - i * dilation_0
        for j in range(kernel_1):
            h = h_0 - j * dilation_1
            inside = exists & (d >= 0) & (d % stride_0 == 0) & (d // stride_0 < positions_0)
            inside = inside & (h >= 0) & (h % stride_1 == 0) & (h // stride_1 < positions_1)
            row = image + (d // stride_0 * positions_1 + h // stride_1) * positions_2
            for k in range(kernel_2):
                w = w_0 - k * dilation_2
                valid = inside & (w >= 0) & (w % stride_2 == 0) & (w // stride_2 < positions_2)
                a += tl.load(row + w // stride_2, valid, 0)
                b += tl.load(row + windows + w // stride_2, valid, 0)
    if keys is not None:
        pixel_keys = keys_of_pixels(
            keys, place, exists, channels, samples, size_0, size_1, size_2, DIMS
        )
    for start in range(0, channels, BLOCK_C):
        channel, valid, inside = block_of_channels(start, channels, exists, BLOCK_C)
        value = tl.load(x[:, None] + channel[None, :] * x_c, inside, 0).to(a.dtype)
        through = a[:, None] + b[:, None] * value
        if keys is not None:
            channel_keys = tl.load(keys + channel, valid, 0)
            through *= keep(pixel_keys, channel_keys, threshold).to(a.dtype)
        at = grad[:, None] + channel[None, :] * grad_c
        tl.store(at, through + tl.load(at, inside, 0).to(a.dtype), inside)
