"""Tools that replace layers of a pruned network that is not finalized: exact, or a clear error at the first forward."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from residual_net import residual_net
from test_surgery_finalize import SHARES, TOOLS, difference, pruned, scripted
from torch import nn
from torch.ao import quantization
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gflow_pl.channels import trace_channels
from gflow_pl.common.errors import SettingsError
from gflow_pl.surgery import apply_structure, rewrite, structure_of


def emptied_storage(model, x):
    """Return the model after ``to_empty``, with its state loaded again."""
    state = copy.deepcopy(model.state_dict())
    model = model.to("meta").to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    model.load_state_dict(state)
    return model


def folded_by_hand(model, x):
    block = model[3]
    block.c2, block.n2 = fuse_conv_bn_eval(block.c2, block.n2), nn.Identity()
    return model


def functional(model, x):
    state = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return lambda x: torch.func.functional_call(model, state, (x,))


PLAIN_TOOLS = {
    **{name: tool for name, tool in TOOLS.items() if name != "fuse_modules"},
    "jit_trace": lambda model, x: torch.jit.trace(model, x),
    "folded_by_hand": folded_by_hand,
    "to_empty": emptied_storage,
    "compile_after_to_empty": lambda model, x: torch.compile(emptied_storage(model, x), backend="aot_eager"),
    "functional_call": functional,
    "pickle": lambda model, x: pickle.loads(pickle.dumps(model)),
    "dynamic": lambda model, x: quantization.quantize_dynamic(model, {nn.Conv2d}),
}


@pytest.mark.filterwarnings("ignore")
@SHARES
@pytest.mark.parametrize("tool", PLAIN_TOOLS)
def test_tools_keep_what_a_pruned_network_computes(tool, share):
    model, x = pruned(share=share)
    other = PLAIN_TOOLS[tool](copy.deepcopy(model), x)
    assert difference(model, other, x) < 1e-12


@SHARES
def test_models_in_one_batch(share):
    models, x = [pruned(share=share)[0] for _ in range(2)], pruned()[1]
    state = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(*state)
    assert torch.allclose(out[1], models[1](x), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_folding_an_expanded_norm_by_its_path_is_refused():
    model, _ = pruned()
    with pytest.raises((AssertionError, NotImplementedError), match="ExpandedBatchNorm2d"):
        quantization.fuse_modules(model, [["3.c2", "3.n2"]])


@SHARES
def test_a_deleted_norm_is_an_error_of_one_sentence(share):
    model, x = pruned(share=share)
    del model[3].n2
    with pytest.raises(SettingsError, match=r"'n2' is missing in ResidualBlock.*gflow_pl\.finalize\(model\)"):
        model(x)


@SHARES
def test_a_norm_of_another_width_is_an_error_of_one_sentence(share):
    model, x = pruned(share=share)
    model[3].c2, model[3].n2 = nn.Conv2d(model[3].c2.in_channels, 8, 3, padding=1).double(), nn.BatchNorm2d(8).double()
    with pytest.raises(SettingsError, match=r"returned 8 channels and should return .*gflow_pl\.finalize\(model\)"):
        model(x)


def test_a_structure_that_is_read_before_the_first_forward_contains_the_expansions():
    model, _ = pruned()
    expected = structure_of(model).expansions
    assert structure_of(nn.SyncBatchNorm.convert_sync_batchnorm(model)).expansions == expected


def test_the_guard_goes_with_the_expansions():
    model, x = pruned()
    apply_structure(model, structure_of(residual_net()))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert type(model[3].n2) is nn.BatchNorm2d
    assert model(x).shape == (2, 3)


def test_norms_in_lists_are_guarded_by_the_module_around_the_list():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = x + norm(conv(x))
            return self.head(x.mean((2, 3)))

    model, x = pruned(Net)
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert difference(model, other, x) < 1e-12


def test_a_network_is_pruned_further_after_its_norms_were_replaced():
    model, x = pruned()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    structure_of(model)
    graph = trace_channels(model, x)
    rewrite(model, graph, {group.name: torch.arange(group.size) < 2 for group in graph.groups})
    assert len(structure_of(model).expansions["3.n2"]["index"]) == 2
    assert model(x).shape == (2, 3)


def test_saved_scripts_and_pickles_of_whole_modules_are_read():
    model, x = pruned()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded[3].n2) is type(model[3].n2)
    assert torch.equal(scripted(loaded, x)(x), model(x))
