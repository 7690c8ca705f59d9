import copy
import pickle

import pytest
import torch
from hand_graphs import build, example, random_plan
from torch import nn

from gflow_pl.surgery import apply_structure, rewrite, scatter_output, structure_of
from gflow_pl.surgery.expansion import Placement, expansion_of, set_expansion


def expanded(dtype=torch.float64):
    model = build("residual", dtype=dtype)
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    assert any(hook is scatter_output for m in model.modules() for hook in m._forward_hooks.values())
    return model


def test_deep_copies_and_pickles_compute_the_same_and_are_independent():
    model = expanded()
    x = example(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert structure_of(other) == structure_of(model)
        apply_structure(other, structure_of(build("residual")))
    assert torch.equal(model(x), expected)


def test_the_index_follows_the_module_to_another_device():
    model = expanded(torch.float32).to("meta")
    assert model.bn2._gflow_index.device.type == "meta"
    assert model(example(model).to("meta")).shape == (4, 4)


def test_state_dict_names_do_not_change():
    assert list(expanded().state_dict()) == list(build("residual").state_dict())


def test_zeros_have_the_dtype_of_the_output_under_autocast():
    conv = nn.Conv2d(3, 2, 1)
    set_expansion(conv, Placement(1, 5, [0, 3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(torch.randn(1, 3, 2, 2))
    assert y.dtype == torch.bfloat16
    assert y.shape == (1, 5, 2, 2)
    assert y[:, [1, 2, 4]].count_nonzero() == 0


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3), 1), ((2, 4, 3), 2), ((2, 3, 4), 1), ((2, 3, 4, 5), 1), ((2, 4, 4, 3), -1)]
)
def test_any_dim_of_any_output(shape, dim):
    module = nn.Identity()
    set_expansion(module, Placement(dim, 6, [1, 2, 5]))
    x = torch.randn(shape)
    y = module(x)
    assert y.shape[dim] == 6
    assert torch.equal(y.index_select(dim, torch.tensor([1, 2, 5])), x)
    assert y.index_select(dim, torch.tensor([0, 3, 4])).count_nonzero() == 0


def test_compiled_without_a_graph_break():
    model = expanded(torch.float32)
    x = example(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_exported():
    model = expanded(torch.float32)
    x = example(model)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_averaged_copies_compute_the_same():
    model = expanded(torch.float32)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average(example(model)), model(example(model)))


def test_second_derivatives_pass_through():
    model = expanded()
    x = example(model)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), parameters, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in again)


def test_memory_format_of_the_output_stays():
    conv = nn.Conv2d(3, 2, 1)
    set_expansion(conv, Placement(1, 5, [0, 3]))
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)


def test_an_expansion_with_all_positions_leaves_no_hook_and_no_attribute():
    module = nn.Linear(2, 3)
    set_expansion(module, Placement(1, 4, [0, 1, 3]))
    set_expansion(module, Placement(1, 3, [0, 1, 2]))
    assert expansion_of(module) is None
    assert not module._forward_hooks
    assert not dict(module.named_buffers())
    assert not [key for key in vars(module) if key.startswith("_gflow")]
