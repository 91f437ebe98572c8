"""Statistics of batch normalisation for values that no worker had."""

import pytest
import torch
from torch import nn

from distbelief.factory import make_model, open_data
from distbelief.job import load_job
from distbelief.statistics import SAMPLES, renew_statistics
from distbelief.workers.order import epoch_order


@pytest.fixture(scope="module")
def train():
    split = open_data(load_job(None, {}, ()), "train")
    assert split is not None
    return split


def test_they_are_those_of_training_samples_whatever_they_were(train):
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(256, 10))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(7.0)
    norm.running_var.fill_(99.0)
    before = [parameter.clone() for parameter in model.parameters()]
    model.eval()
    renew_statistics(model, train, 64, seed=3)
    indices = epoch_order(3, 0, len(train))[:SAMPLES].tolist()
    batches = [train.samples.read(indices[i : i + 64]).inputs for i in range(0, len(indices), 64)]
    means = torch.stack([batch.mean() for batch in batches])
    assert float(norm.running_mean) == pytest.approx(float(means.mean()), abs=1e-5)
    variances = torch.stack([batch.var() for batch in batches])
    assert float(norm.running_var) == pytest.approx(float(variances.mean()), rel=1e-4)
    assert not model.training
    assert all(map(torch.equal, before, model.parameters()))


def test_a_network_without_them_is_left_alone(train, monkeypatch):
    model = nn.Linear(256, 10)
    monkeypatch.setattr(type(train.samples), "read", None)
    renew_statistics(model, train, 64, seed=3)


def test_they_mend_a_network_whose_values_were_changed(train):
    job = load_job(None, {"model.width": 0.1}, ())
    model = make_model(job, train)
    conv1 = model.get_submodule("conv1")
    images = train.samples.read(list(range(64))).inputs
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        wanted = conv1(images)
        model.eval()
        renew_statistics(model, train, 64, seed=0)
        found = conv1(images)
    assert float((wanted - found).abs().mean() / wanted.abs().mean()) < 0.1
