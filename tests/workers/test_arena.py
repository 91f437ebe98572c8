"""The arena: parameters and gradients as views of flat vectors, and what left it comes back."""

import pytest
import torch
from torch import nn

from distbelief.param_server.layout import Group, layout_of, trainable
from distbelief.workers.arena import Arena, refuse_sparse_modules


def arena_of(model: nn.Module) -> Arena:
    named = trainable(model.named_parameters())
    return Arena(layout_of(named, (Group(lr=0.1),)), named)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def backward(model: nn.Module, width: int = 3) -> None:
    model(torch.ones(1, width)).float().sum().backward()


def test_gather_copies_the_parameters_in_the_order_of_the_layout(model):
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    values = arena_of(model).gather()
    assert values.equal(expected)
    values.zero_()
    assert torch.cat([p.detach().reshape(-1) for p in model.parameters()]).equal(expected)


def test_bind_turns_parameters_to_a_vector_without_a_copy(model):
    arena = arena_of(model)
    first, second = torch.arange(26.0), torch.arange(26.0) + 100
    for vector in (first, second):
        arena.bind(vector)
        for entry, parameter in zip(arena.layout.entries, model.parameters(), strict=True):
            assert parameter.data_ptr() == vector[entry.offset :].data_ptr()
            assert parameter.shape == entry.shape
    first.fill_(-1)
    assert model[0].weight[0, 0] == 100


def test_backward_writes_gradients_straight_into_the_arena(model):
    arena = arena_of(model)
    arena.zero_grad()
    backward(model)
    assert arena.collect() == []
    for entry, parameter in zip(arena.layout.entries, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == arena.grad[entry.offset :].data_ptr()
    assert arena.grad[:12].view(4, 3).equal(model[1].weight.sum(0).view(4, 1).expand(4, 3))


def test_gradients_that_left_the_arena_are_brought_back(model):
    arena = arena_of(model)
    arena.zero_grad()
    model.zero_grad()  # torch replaces .grad by default
    backward(model)
    model[1].bias.grad = torch.tensor([5.0, 6.0])
    assert arena.collect() == []
    assert arena.grad[-2:].tolist() == [5.0, 6.0]
    assert arena.grad[:12].equal(model[0].weight.grad.reshape(-1))


def test_absent_tensors_are_named_and_zero(model):
    arena = arena_of(model)
    arena.grad.fill_(7)  # a step before
    arena.zero_grad()
    model[0](torch.ones(1, 3)).sum().backward()
    assert arena.collect() == ["1.weight", "1.bias"]
    assert arena.grad[16:].count_nonzero() == 0
    assert arena.grad[:16].count_nonzero() == 16


def test_a_gradient_removed_after_backward_is_absent(model):
    arena = arena_of(model)
    arena.zero_grad()
    backward(model)
    model[0].bias.grad = None
    assert arena.collect() == ["0.bias"]
    assert arena.grad[12:16].tolist() == [0, 0, 0, 0]


def test_gradients_of_two_backward_passes_add_up(model):
    arena = arena_of(model)
    arena.zero_grad()
    backward(model)
    arena.collect()
    once = arena.grad.clone()
    backward(model)
    assert arena.collect() == []
    torch.testing.assert_close(arena.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_copied_from_and_to_float32(dtype):
    model = nn.Linear(3, 2).to(dtype)
    arena = arena_of(model)
    assert arena.gather().equal(
        torch.cat([p.detach().float().reshape(-1) for p in (*model.parameters(),)])
    )
    own = model.weight.data_ptr()
    arena.bind(torch.arange(8.0))
    assert model.weight.data_ptr() == own
    assert model.weight.dtype == dtype
    assert model.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    arena.zero_grad()
    (model.weight.sum() * 3 + model.bias.sum()).backward()
    assert arena.collect() == []
    assert arena.grad.tolist() == [3] * 6 + [1] * 2
    arena.zero_grad()
    assert arena.collect() == ["weight", "bias"]
    assert arena.grad.count_nonzero() == 0


def test_a_sparse_gradient_is_refused_by_name_when_it_comes():
    table = nn.Embedding(5, 3, sparse=True)
    arena = arena_of(table)
    arena.zero_grad()
    with pytest.raises(ValueError, match=r"the gradient of weight \[5, 3\] is sparse"):
        table(torch.tensor([1])).sum().backward()
    arena.close()


def test_a_sparse_gradient_set_by_hand_is_refused_by_name():
    table = nn.Embedding(5, 3)
    arena = arena_of(table)
    arena.zero_grad()
    table.weight.grad = torch.ones(5, 3).to_sparse()
    with pytest.raises(ValueError, match=r"the gradient of weight \[5, 3\] is sparse"):
        arena.collect()


def test_close_takes_the_hooks_off():
    table = nn.Embedding(5, 3, sparse=True)
    arena = arena_of(table)
    arena.close()
    table(torch.tensor([1])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_scan_of_the_modules_finds_sparse_embeddings(kind):
    model = nn.ModuleDict({"words": kind(5, 3, sparse=True)})
    with pytest.raises(ValueError, match=rf"words\.weight .*{kind.__name__} with sparse=True"):
        refuse_sparse_modules(model.named_modules())
    with pytest.raises(ValueError, match=r"^weight will have"):
        refuse_sparse_modules(kind(5, 3, sparse=True).named_modules())


def test_a_scan_lets_pass_what_gets_no_sparse_gradient():
    frozen = nn.Embedding(5, 3, sparse=True).requires_grad_(False)
    own = nn.Linear(1, 1)
    own.sparse = True  # type: ignore[assignment]  # somebody's own word
    refuse_sparse_modules(nn.ModuleList([frozen, own, nn.Embedding(5, 3)]).named_modules())


def test_a_parameter_of_one_number_and_an_empty_one_have_their_place():
    model = nn.ParameterDict(
        {"scale": nn.Parameter(torch.tensor(2.0)), "none": nn.Parameter(torch.empty(0, 3))}
    )
    arena = arena_of(model)
    arena.bind(torch.tensor([5.0]))
    assert model["scale"].item() == 5
    arena.zero_grad()
    (model["scale"] * 3 + model["none"].sum()).backward()
    assert arena.collect() == []
    assert arena.grad.tolist() == [3]


def test_a_gradient_that_a_script_puts_there_without_backward_is_there(model):
    arena = arena_of(model)
    arena.zero_grad()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    assert arena.collect() == ["0.bias", "1.weight", "1.bias"]
    assert arena.grad[:12].tolist() == [1] * 12
    arena.close()


def test_as_in_torch_a_tensor_without_a_gradient_has_none(model):
    arena = arena_of(model)
    backward(model)
    arena.zero_grad()
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4
    model[0](torch.ones(1, 3)).sum().backward()
    arena.collect()
    assert [parameter.grad is None for parameter in model.parameters()] == [False] * 2 + [True] * 2
    arena.close()


def test_a_hook_brings_a_gradient_in_as_soon_as_it_is_complete(model):
    """So its own memory is free for the next one, and what is read is in the cache."""
    arena = arena_of(model)
    arena.zero_grad()
    seen = {}

    def touch(index, *, again):
        entry = arena.layout.entries[index]
        seen[entry.name] = (arena.grad[entry.offset : entry.stop].clone(), again)

    arena.on_touch = touch
    backward(model)
    for name, parameter in model.named_parameters():
        values, again = seen[name]
        assert not again
        assert values.equal(parameter.grad.reshape(-1))
    arena.close()


def test_a_second_gradient_in_one_step_is_seen(model):
    arena = arena_of(model)
    seen = []
    for num in (1, 1, 2):
        arena.zero_grad()
        for _ in range(num):
            backward(model)
        seen.append(arena.is_repeated)
    assert seen == [False, False, True]
    arena.close()


def test_a_gradient_keeps_the_sign_of_its_zeros(model):
    """Zeros to add to would lose it, and torch's optimizers see it."""
    arena = arena_of(model)
    arena.zero_grad()
    (model[0].bias * -torch.zeros(4)).sum().backward()
    arena.collect()
    assert arena.grad[12:16].signbit().all()
    arena.close()


def test_a_local_step_moves_the_bound_values(model):
    arena = arena_of(model)
    values = torch.ones(26)
    arena.bind(values)
    arena.grad.fill_(2)
    arena.step_locally(0.25)
    assert model[1].bias.tolist() == [0.5, 0.5]
    assert values.tolist() == [0.5] * 26


def test_a_local_step_of_half_precision_is_taken_in_float32():
    model = nn.Linear(3, 2).bfloat16()
    arena = arena_of(model)
    values = torch.ones(8)
    arena.bind(values)
    arena.grad.fill_(1)
    for _ in range(8):
        arena.step_locally(2**-10)  # one of these is lost in bfloat16
    assert model.bias.tolist() == [1 - 2**-7] * 2


def test_gradients_that_are_to_stay_stay_as_zeros(model):
    arena = arena_of(model)
    arena.zero_grad(set_to_none=False)
    assert len(arena.collect()) == len(list(model.parameters()))  # there were none
    backward(model)
    arena.zero_grad(set_to_none=False)
    assert arena.collect() == []
    assert not arena.grad.any()
    arena.zero_grad()
    assert len(arena.collect()) == len(list(model.parameters()))
    arena.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_type_may_stay_as_zeros(dtype):
    model = nn.Linear(3, 2).to(dtype)
    arena = arena_of(model)
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    arena.zero_grad(set_to_none=False)
    assert arena.collect() == []
    assert not arena.grad.any()
    arena.close()


def test_a_gradient_with_a_graph_leaves_the_graph_behind(model):
    arena = arena_of(model)
    arena.zero_grad()
    weight = model[0].weight
    weight.grad = torch.ones_like(weight) * weight
    arena.collect()
    assert not arena.grad.requires_grad
    arena.close()
