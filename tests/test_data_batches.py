"""Batches: a pure function of seed, epoch, step and rank; each image augmented by itself."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelnorm.experiments.data import (
    Augment,
    Images,
    Preprocess,
    batches,
    steps_per_epoch,
)
from kernelnorm.experiments.errors import DataError


def numbered(n, size=4):
    """Images whose pixels are all their own number, below 256."""
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, size, size)
    return Images(pixels.contiguous(), torch.arange(n), tuple(map(str, range(n))))


def noise(n, height, width):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def labels(*args, **kwargs):
    return [y.tolist() for _, y in batches(*args, **kwargs)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestOrder:
    def test_training_shuffles_and_keeps_pixels_with_their_labels(self):
        seen = []
        for x, y in batches(numbered(20), 8, train=True):
            assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
            seen += y.tolist()
        assert sorted(seen) == list(range(20))
        assert seen != list(range(20))

    def test_evaluation_goes_in_order(self):
        assert labels(numbered(7), 3, train=False) == [[0, 1, 2], [3, 4, 5], [6]]

    def test_order_is_a_function_of_seed_and_epoch(self):
        def order(**kw):
            return labels(numbered(50), 8, train=True, **kw)

        torch.manual_seed(1)
        first = order(seed=1, epoch=2)
        torch.manual_seed(2)
        assert order(seed=1, epoch=2) == first
        assert order(seed=2, epoch=1) != first
        assert order(seed=1, epoch=3) != first

    def test_the_global_generator_is_left_alone(self):
        state = torch.get_rng_state()
        list(batches(numbered(8), 2, train=True, augment=Augment()))
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_last_batch_of_one_image_is_left_out_of_training_only(self):
        assert [len(y) for y in labels(numbered(9), 4, train=True)] == [4, 4]
        assert [len(y) for y in labels(numbered(10), 4, train=True)] == [4, 4, 2]
        assert [len(y) for y in labels(numbered(9), 4, train=False)] == [4, 4, 1]
        assert [len(y) for y in labels(numbered(3), 1, train=True)] == [1, 1, 1]

    @given(
        n=st.integers(2, 60),
        batch_size=st.integers(1, 9),
        start=st.integers(0, 5),
        seed=st.integers(0, 2**64),
        train=st.booleans(),
    )
    def test_starting_at_a_step_continues_the_epoch(self, n, batch_size, start, seed, train):
        images = Images(noise(n, 9, 8), torch.arange(n), ("a",) * n)
        kw = {"train": train, "seed": seed, "epoch": 1, "augment": Augment() if train else None}
        whole = list(batches(images, batch_size, **kw))
        assert len(whole) == steps_per_epoch(n, batch_size, train=train)
        start = min(start, len(whole))
        rest = list(batches(images, batch_size, start_step=start, **kw))
        assert len(rest) == len(whole) - start
        for (x, y), (x_rest, y_rest) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, x_rest)
            assert torch.equal(y, y_rest)


class TestRanks:
    @given(n=st.integers(8, 100), batch_size=st.integers(1, 9), world_size=st.integers(1, 4))
    def test_training_shares_are_disjoint_and_equal(self, n, batch_size, world_size):
        kw = {"train": True, "world_size": world_size}
        shares = [labels(numbered(n), batch_size, rank=r, **kw) for r in range(world_size)]
        sizes = [[len(y) for y in share] for share in shares]
        assert sizes == [sizes[0]] * world_size
        assert len(sizes[0]) == steps_per_epoch(n, batch_size, **kw)
        seen = [i for share in shares for y in share for i in y]
        assert len(set(seen)) == len(seen)
        assert n - len(seen) < 2 * world_size

    @given(n=st.integers(0, 100), batch_size=st.integers(1, 9), world_size=st.integers(1, 4))
    def test_evaluation_shares_are_disjoint_and_complete(self, n, batch_size, world_size):
        kw = {"train": False, "world_size": world_size}
        shares = [labels(numbered(n), batch_size, rank=r, **kw) for r in range(world_size)]
        for rank, share in enumerate(shares):
            assert len(share) == steps_per_epoch(n, batch_size, rank=rank, **kw)
        assert sorted(i for share in shares for y in share for i in y) == list(range(n))

    def test_ranks_augment_differently(self):
        images = Images(noise(1, 16, 16).expand(8, -1, -1, -1), torch.zeros(8).long(), ("a",))
        x, y = (
            next(batches(images, 4, train=True, augment=Augment(), rank=rank, world_size=2))[0]
            for rank in range(2)
        )
        assert not torch.equal(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be between 0 and world_size - 1, got 2 of 2"),
        ({"start_step": 3}, "start_step must be between 0 and 2, got 3"),
        ({"start_step": -1}, "start_step must be between 0 and 2, got -1"),
        ({"world_size": 9}, "8 images are too few to train on in 9 processes"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(numbered(8), **{"batch_size": 4, "train": True, **arguments})


class TestAugment:
    @given(
        height=st.integers(1, 20),
        width=st.integers(1, 20),
        crop=st.booleans(),
        flip=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_each_output_is_a_crop_or_flip_of_its_own_input(self, height, width, crop, flip, seed):
        images = noise(3, height, width)
        down, across = height // 8 if crop else 0, width // 8 if crop else 0
        outputs = Augment(crop, flip)(images, seeded(seed))
        padding = [across, across, down, down]
        for image, output in zip(images, outputs, strict=True):
            padded = torch.nn.functional.pad(image[None].float(), padding, mode="reflect")[0].byte()
            crops = [
                padded[:, i : i + height, j : j + width]
                for i in range(2 * down + 1)
                for j in range(2 * across + 1)
            ]
            candidates = crops + [crop.flip(2) for crop in crops if flip]
            assert any(torch.equal(output, candidate) for candidate in candidates)

    def test_nothing_to_do(self):
        images = noise(4, 16, 16)
        assert torch.equal(Augment(crop=False, flip=False)(images, seeded()), images)

    def test_half_are_flipped(self):
        image = torch.tensor([[[[0, 1]]]], dtype=torch.uint8).expand(4000, 1, 1, 2)
        flipped = Augment(crop=False)(image, seeded())[:, 0, 0, 0].float().mean()
        assert 0.46 < flipped < 0.54  # 5 standard deviations

    def test_every_shift_occurs_alike(self):
        image = torch.arange(32, dtype=torch.uint8).expand(9000, 1, 32, 32)
        shifts = Augment(flip=False)(image, seeded())[:, 0, 0, 16].long() - 16
        assert sorted(shifts.unique().tolist()) == list(range(-4, 5))
        assert ((shifts + 4).bincount() / 1000 - 1).abs().max() < 0.16  # 5 standard deviations

    def test_is_a_function_of_the_generator(self):
        images = noise(8, 32, 32)
        first = Augment()(images, seeded(1))
        assert torch.equal(Augment()(images, seeded(1)), first)
        assert not torch.equal(Augment()(images, seeded(2)), first)

    def test_memory_format_does_not_matter(self):
        images = noise(4, 16, 16)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(Augment()(images, seeded()), Augment()(channels_last, seeded()))


class TestPreprocess:
    def test_divides_by_255(self):
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        x = Preprocess()(pixels)
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.arange(256.0).view(1, 1, 16, 16) / 255)

    def test_standardises_each_channel(self):
        pixels = torch.tensor([[[[51]], [[102]]]], dtype=torch.uint8)
        x = Preprocess(mean=(0.1, 0.5), std=(0.5, 0.2))(pixels)
        torch.testing.assert_close(x.flatten(), torch.tensor([0.2, -0.5]))

    def test_keeps_channels_last(self):
        pixels = noise(2, 4, 4).contiguous(memory_format=torch.channels_last)
        x = Preprocess((0.5,) * 3, (0.5,) * 3)(pixels)
        assert x.is_contiguous(memory_format=torch.channels_last)

    def test_fixed_values_depend_on_the_number_of_channels_alone(self):
        images = Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), ("a",))
        assert Preprocess.fixed(images) == Preprocess((0.5,) * 3, (0.25,) * 3)

    def test_statistics_of_the_images_standardise_them(self):
        images = Images(noise(300, 5, 4) // 2, torch.zeros(300).long(), ("a",))
        x = Preprocess.standardise(images)(images.pixels).double()
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            x.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize("value", [0, 77])
    def test_a_channel_of_one_value_is_named(self, value):
        images = Images(noise(30, 5, 4), torch.zeros(30).long(), ("a",))
        images.pixels[:, 1] = value
        with pytest.raises(DataError, match=f"channel 1 of the images is {value} in every pixel"):
            Preprocess.standardise(images)

    @pytest.mark.parametrize(
        ("mean", "std"), [((0.5,), None), (None, (0.5,)), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))]
    )
    def test_mean_and_std_belong_together(self, mean, std):
        with pytest.raises(ValueError, match="one number per channel, and std must be above 0"):
            Preprocess(mean, std)


def test_the_benchmark_prints_a_line_for_each_batch_size(monkeypatch, capsys):
    script = str(Path(__file__).parent.parent / "benchmarks" / "data_path.py")
    options = ["--batch-sizes", "2", "32", "--seconds", "0.01", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [script, "digits", *options])
    runpy.run_path(script, run_name="__main__")
    _, heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.startswith("data set")
    assert len(lines) == 2
    for line, expected in zip(lines, ("2", "32"), strict=True):
        name, shape, _, batch_size, *speeds = line.split()
        assert (name, shape, batch_size) == ("digits", "1x8x8", expected)
        assert all(float(speed.replace(",", "")) > 0 for speed in speeds)
