"""A finalized network computes what the pruned one computes, before and after tools that replace its layers."""

import copy
import io
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torchvision
from masked_networks import random_plan, randomize_parameters
from residual_net import residual_net
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization

import gflow_pl
from gflow_pl.surgery import apply_structure, finalize, rewrite, structure_of

SHARES = pytest.mark.parametrize("share", [0.5, 0.99], ids=["several", "one_left"])


def pruned(make=residual_net, size=8, share=0.5, dtype=torch.float64, **settings):
    """Return a network that is pruned at random, and an input."""
    torch.manual_seed(0)
    model = randomize_parameters(make().to(dtype)).eval()
    x = torch.randn(2, 3, size, size, dtype=dtype)
    graph = gflow_pl.trace_channels(model, x, **settings)
    rewrite(model, graph, random_plan(graph, share))
    return model, x


@torch.no_grad()
def difference(model, other, x):
    expected = model(x)
    return float((other(x) - expected).abs().max() / expected.abs().max())


def scripted(model, x):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        return torch.jit.load(file)


def folded_by_path(model, x):
    pairs = [["0", "1.layer"], ["3.c1", "3.n1"], ["3.c2", "3.n2.layer"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.fuse_modules(model, pairs)


TOOLS = {
    "script": scripted,
    "fx_trace": lambda model, x: torch.fx.symbolic_trace(model),
    "fx_fuse": lambda model, x: optimization.fuse(model),
    "fuse_modules": folded_by_path,
    "sync_batch_norm": lambda model, x: nn.SyncBatchNorm.convert_sync_batchnorm(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "deepcopy": lambda model, x: copy.deepcopy(model),
}


@SHARES
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_keep_what_a_finalized_network_computes(tool, share):
    model, x = pruned(share=share)
    other = TOOLS[tool](finalize(model), x)
    assert difference(model, other, x) < 1e-12
    if "fuse" in tool:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in other.modules())


@SHARES
@pytest.mark.parametrize("is_qat", [False, True], ids=["static", "qat"])
def test_quantization_of_a_finalized_network(share, is_qat):
    model, x = pruned(share=share, dtype=torch.float32)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = quantization.get_default_qat_qconfig_mapping if is_qat else quantization.get_default_qconfig_mapping
        prepare = quantize_fx.prepare_qat_fx if is_qat else quantize_fx.prepare_fx
        prepared = prepare(finalize(model).train(is_qat), mapping("fbgemm"), (x,)).eval()
        prepared(x)
        converted = quantize_fx.convert_fx(prepared)
        assert difference(model, converted, x) < 0.25
    torch.backends.quantized.engine = engine
    assert not any(type(module) is nn.Conv2d for module in converted.modules())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_finalized_network_is_ready_for_models_in_one_batch():
    models = [finalize(pruned()[0]) for _ in range(2)]
    x = pruned()[1]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    together = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    assert torch.allclose(together[1], models[1](x), rtol=1e-12, atol=0)


ZOO = {
    "resnet18": (torchvision.models.resnet18, 64, {"residual": "expand"}),
    "mobilenet": (torchvision.models.mobilenet_v3_small, 64, {"residual": "expand", "frozen": "expand"}),
    "densenet": (torchvision.models.densenet121, 32, {"residual": "expand", "frozen": "expand"}),
    "convnext": (torchvision.models.convnext_tiny, 64, {"residual": "expand"}),
    "swin": (torchvision.models.swin_t, 64, {"residual": "expand", "frozen": "expand"}),
    **{
        name: (getattr(gflow_pl.models, name), 32, {"residual": "expand", "frozen": "expand"})
        for name in ("vgg13", "mobilenet_v1", "resnet56", "resnet34", "resnet18")
    },
}


@pytest.mark.parametrize("name", ZOO)
def test_networks_are_equal_bit_for_bit_and_traced_by_fx(name):
    make, size, settings = ZOO[name]
    model, x = pruned(make, size, 0.6, **settings)
    structure = structure_of(model)
    final = finalize(model)
    expected = model(x)
    assert torch.equal(final(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(final)(x), expected)
    assert structure_of(model) == structure
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in final.modules())
    assert not any(name for module in final.modules() for name in vars(module) if name.startswith("_gflow"))


def test_scripting_of_a_network_with_gathers():
    model, x = pruned(torchvision.models.convnext_tiny, 32, 0.6, residual="expand")
    assert structure_of(model).gathers
    assert torch.equal(scripted(finalize(model), x)(x), model(x))


def test_a_state_dict_is_loaded_into_a_finalized_network_of_the_same_structure():
    model, x = pruned(share=0.99)
    final = finalize(model)
    fresh = residual_net().double()
    apply_structure(fresh, structure_of(model))
    fresh = finalize(fresh).eval().to_empty(device="cpu")
    fresh.load_state_dict(final.state_dict())
    assert torch.equal(fresh(x), final(x))
    assert {"3.n2.layer.weight", "3.n2.scatter.positions"} <= set(final.state_dict())


def test_attributes_of_a_replaced_norm():
    final = finalize(pruned()[0])
    norm = final[3].n2
    assert norm.weight is norm.layer.weight
    assert norm.num_features == norm.layer.num_features
    norm.weight = nn.Parameter(torch.zeros_like(norm.weight))
    assert norm.layer.weight.count_nonzero() == 0
    with pytest.raises(AttributeError, match="missing"):
        _ = norm.missing


def test_layers_without_filters_become_plain_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 6, 3, 2, 1, 1)
            self.branch, self.norm = nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.up(self.norm(self.branch(x)))
            y = x.mean((2, 3))
            return self.out(y + self.head(y))

    model = randomize_parameters(Net().double()).eval()
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    graph = gflow_pl.trace_channels(model, x, residual="expand")
    plan = {}
    for group in graph.groups:
        goes = group.expansion is not None and group.layers[0].layer != "stem"
        plan[group.name] = torch.full((group.size,), not goes)
    rewrite(model, graph, plan)
    final = finalize(model)
    assert sum("forward" in vars(module) for module in model.modules()) >= 2
    assert not any("forward" in vars(module) for module in final.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(final(x), model(x))
    for other in (final, scripted(final, x), torch.fx.symbolic_trace(final)):
        assert torch.equal(other(x), model(x))


class Shared(nn.Module):
    """A norm that is called twice, by its name and from a list."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.conv = nn.Conv2d(8, 8, 1)
        self.same = self.norm
        self.held = [self.norm]

    def forward(self, x):
        x = self.stem(x)
        x = x + self.held[0](self.conv(x))
        return self.head((x + self.same(self.conv(x))).mean((2, 3)))


def test_shared_layers_share_their_container():
    model, x = pruned(Shared)
    final = finalize(model)
    assert final.same is final.norm is not None
    assert torch.equal(final(x), model(x))


def test_hooks_of_the_user_see_the_same_tensors():
    seen = []

    def note(module, args, output):
        seen.append(output)

    model = randomize_parameters(residual_net().double()).eval()
    model[3].n2.register_forward_hook(note)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gflow_pl.trace_channels(model, x)
    rewrite(model, graph, random_plan(graph, 0.5))
    model[3].n2.register_forward_hook(note)
    seen.clear()
    model(x)
    finalize(model)(x)
    first, second, third, fourth = seen
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert first.shape[1] < second.shape[1]


def test_a_lightning_module():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = residual_net()

        def forward(self, x):
            return self.net(x)

    model, x = pruned(Module)
    model._trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    final = finalize(model)
    assert isinstance(final, pl.LightningModule)
    assert torch.equal(final(x), model(x))
