"""Which staging a model gets, and that on the CPU it does nothing."""

import pytest
import torch
from torch import nn

from distbelief.workers.outgoing import Outgoing
from distbelief.workers.staging import AT_ONCE, Cuda, InPlace, staging_of


def test_parameters_of_the_cpu_are_computed_on_in_place():
    staging = staging_of(nn.Linear(3, 2).parameters())
    assert isinstance(staging, InPlace)
    assert staging.is_in_place


def test_parameters_of_several_devices_are_copied_one_by_one():
    """As of a model that is split over devices, or of a device that is not CUDA."""
    tensors = [torch.empty(2), torch.empty(2, device="meta")]
    assert isinstance(staging_of(tensors), InPlace)
    assert isinstance(staging_of(tensors[1:]), InPlace)


@pytest.mark.gpu
def test_parameters_of_one_cuda_device_stay_there():
    staging = staging_of(nn.Linear(3, 2).cuda().parameters())
    assert isinstance(staging, Cuda)
    assert staging.vector(5).is_cuda
    staging.close()
    staging.close()


def test_in_place_nothing_is_copied_and_nothing_waits():
    staging, host = InPlace(), torch.arange(6.0)
    outgoing = Outgoing(staging, host)
    assert outgoing.grad is host
    assert outgoing.copy_out(0, 6, staging.mark()) is AT_ONCE
    assert staging.copy_in(host, host, staging.mark()) is AT_ONCE
    staging.hold(AT_ONCE)
    AT_ONCE.wait()
    assert host.tolist() == [0, 1, 2, 3, 4, 5]
    staging.close()


def test_a_number_is_read_at_once_and_without_its_graph():
    loss = (nn.Parameter(torch.tensor([1.5])) * 2).sum()
    reading = InPlace().read(loss)
    assert reading.is_there
    assert reading.value == 3


def test_a_fingerprint_tells_a_changed_vector():
    staging, vector = InPlace(), torch.randn(1000)
    before = staging.fingerprint(vector).value
    assert staging.fingerprint(vector.clone()).value == before
    vector[17] *= 1 + 2**-20
    assert staging.fingerprint(vector).value != before
