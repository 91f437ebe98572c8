"""The meter: a gradient held against the one that fresh parameters have."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbelief.workers.meter import Meter


class Quadratic(nn.Module):
    """Loss 0.5 |p|^2 whatever the inputs are, so that the gradient is p itself."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, _: Tensor) -> Tensor:
        return self.p.square().sum() / 2


class Noisy(nn.Module):
    """Batch normalisation and dropout: what a second pass could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.drop(F.relu(self.norm(self.first(inputs)))))
        return outputs


def as_it_is(outputs: object, _: object) -> Tensor:
    assert isinstance(outputs, Tensor)
    return outputs


def cross_entropy(outputs: object, targets: Tensor) -> Tensor:
    assert isinstance(outputs, Tensor)
    return F.cross_entropy(outputs, targets)


def move_to(model: Quadratic, values: list[float]) -> None:
    with torch.no_grad():
        model.p.copy_(torch.tensor(values))


@pytest.mark.parametrize(
    ("fresh", "cosine", "gap", "rate"),
    [
        ([3.0, 4.0], 1.0, 0.0, 1.0),
        ([1.5, 2.0], 1.0, 3.125 - 12.5, 2.0),  # on the way to the minimum: it now goes too far
        ([-4.0, 3.0], 0.0, 0.0, 0.0),  # at right angles: of no use
        ([-3.0, -4.0], -1.0, 0.0, -1.0),  # beyond the minimum: it does harm
    ],
)
def test_a_gradient_against_the_one_on_fresh_parameters(fresh, cosine, gap, rate):
    model = Quadratic()
    meter = Meter(model, as_it_is, 1.0, seed=0)
    meter.begin()
    loss = model(torch.empty(0))
    loss.backward()
    meter.keep(loss)
    move_to(model, fresh)
    measured = meter.measure(torch.empty(0), None, staleness=3)
    assert measured is not None
    assert measured.updates == 4
    assert measured.cosine == pytest.approx(cosine, abs=1e-6)
    assert measured.gap == pytest.approx(gap)
    assert measured.rate == pytest.approx(rate, abs=1e-6)
    assert model.unused.grad is None
    assert model.p.grad is not None
    assert model.p.grad.tolist() == [3.0, 4.0]


def test_at_a_minimum_there_is_no_direction():
    model = Quadratic()
    meter = Meter(model, as_it_is, 1.0, seed=0)
    meter.begin()
    loss = model(torch.empty(0))
    loss.backward()
    meter.keep(loss)
    move_to(model, [0.0, 0.0])
    measured = meter.measure(torch.empty(0), None, 0)
    assert measured is not None
    assert (measured.cosine, measured.rate) == (0.0, 0.0)


def test_the_same_parameters_have_the_same_gradient_with_dropout():
    torch.manual_seed(1)
    model = Noisy()
    meter = Meter(model, cross_entropy, 1.0, seed=0)
    inputs, targets = torch.randn(12, 6), torch.arange(12) % 3
    meter.begin()
    loss = cross_entropy(model(inputs), targets)
    loss.backward()
    meter.keep(loss)
    measured = meter.measure(inputs, targets, 0)
    assert measured is not None
    assert measured.cosine == pytest.approx(1.0, abs=1e-6)
    assert measured.gap == 0.0
    assert measured.rate == pytest.approx(1.0, abs=1e-6)


def test_it_leaves_no_trace():
    """Random numbers, buffers and gradients are as if it had not been."""

    def train(share: float) -> list[Tensor]:
        torch.manual_seed(7)
        model = Noisy()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        meter = Meter(model, cross_entropy, share, seed=0)
        for _ in range(5):
            inputs, targets = torch.randn(12, 6), torch.arange(12) % 3
            meter.begin()
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            meter.keep(loss)
            optimizer.step()
            meter.measure(inputs, targets, 0)
        return list(model.state_dict().values())

    for without, with_it in zip(train(0.0), train(1.0), strict=True):
        assert torch.equal(without, with_it)


def test_a_share_of_the_steps_is_measured():
    model = Quadratic()
    meter = Meter(model, as_it_is, 0.2, seed=3)
    count = 0
    for _ in range(200):
        meter.begin()
        loss = model(torch.empty(0))
        loss.backward()
        meter.keep(loss)
        count += meter.measure(torch.empty(0), None, 0) is not None
    assert 25 <= count <= 55
