"""Payloads: checksums, and frames as tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbelief.param_server.protocol import STATUSES, as_frame, as_tensor, checksum

floats = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9
)


@given(floats, st.data())
def test_a_checksum_changes_with_any_single_bit(numbers, data):
    values = torch.tensor(numbers, dtype=torch.float32)
    changed = values.clone()
    bit = data.draw(st.integers(0, 32 * len(numbers) - 1))
    changed.numpy().view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert checksum(changed) != checksum(values)


@given(floats, st.data())
def test_a_checksum_changes_with_any_single_element(numbers, data):
    values = torch.tensor(numbers, dtype=torch.float32)
    changed = values.clone()
    index = data.draw(st.integers(0, len(numbers) - 1))
    changed[index] = data.draw(st.floats(width=32, allow_nan=False, allow_infinity=False))
    is_same = values.numpy().tobytes() == changed.numpy().tobytes()
    assert (checksum(changed) == checksum(values)) == is_same


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 63, 64, 1001])
def test_every_bit_of_a_length_counts_and_the_sum_fits_a_header(numel):
    values = torch.randn(numel)
    expected = checksum(values)
    assert 0 <= expected < 2**32
    data = values.numpy().view(np.uint8)
    for byte in range(0, data.size, 7):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert checksum(values) != expected
            data[byte] ^= 1 << bit
    assert checksum(values) == expected


@pytest.mark.parametrize("numel", [2, 64, 2**16])
def test_constant_vectors_have_checksums_of_their_own(numel):
    constants = [k / 8 for k in range(-40, 40)]
    assert len({checksum(torch.full((numel,), c)) for c in constants}) == len(constants)


def test_the_checksum_of_a_slice_is_that_of_its_copy():
    values = torch.randn(100)
    for start in range(4):
        piece = values[start : start + 33]
        assert checksum(piece) == checksum(piece.clone())


@given(floats)
def test_a_frame_gives_back_its_tensor(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    again = as_tensor(as_frame(values))
    assert again is not None
    assert torch.equal(again, values)


def test_aligned_writable_memory_is_not_copied():
    values = torch.zeros(16)
    again = as_tensor(as_frame(values))
    assert again is not None
    assert again.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 5, 7])
def test_misaligned_memory_is_copied(shift):
    values = torch.arange(10, dtype=torch.float32)
    buffer = bytearray(100)
    buffer[shift : shift + 40] = values.numpy().tobytes()
    tensor = as_tensor(memoryview(buffer)[shift : shift + 40])
    assert tensor is not None
    assert tensor.data_ptr() % 8 == 0
    assert torch.equal(tensor, values)
    buffer[:] = bytes(100)
    assert torch.equal(tensor, values)


def test_read_only_bytes_are_copied():
    tensor = as_tensor(bytes(8))
    assert tensor is not None
    tensor.fill_(1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4095])
def test_bytes_that_are_no_floats_are_no_tensor(size):
    assert as_tensor(bytes(size)) is None


def test_no_bytes_are_no_floats():
    tensor = as_tensor(b"")
    assert tensor is not None
    assert tensor.numel() == 0
    assert as_frame(tensor).nbytes == 0


def test_every_status_is_explained():
    assert set(STATUSES) == {
        "applied",
        "dup",
        "spent",
        "nonfinite",
        "norm",
        "numel",
        "form",
        "checksum",
        "base",
        "conflict",
        "gap",
    }
