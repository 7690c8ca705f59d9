"""Counts equal closed forms and the known numbers of the networks, and do not change the network."""

import io

import pytest
import torch
from torch import nn

from gflow_pl import models
from gflow_pl.reports import count_network, state_bytes

# Multiply-accumulates of conv and linear for one 3x32x32 image, 10 classes.
PINNED = {
    "vgg13": 228_267_008,
    "mobilenet_v1": 46_354_432,
    "resnet56": 125_747_840,
    "resnet34": 1_159_402_496,
    "resnet18": 555_422_720,
}


@pytest.mark.parametrize("name", PINNED)
def test_the_five_networks_have_their_known_costs(name):
    model = getattr(models, name)(num_classes=10)
    counts = count_network(model, torch.zeros(1, 3, 32, 32))
    assert counts.macs == PINNED[name]
    assert counts.flops == 2 * PINNED[name]
    assert sum(counts.by_layer().values()) == counts.macs
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    convs_and_linears = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(counts.by_layer()) == sorted(convs_and_linears)
    assert "native_batch_norm" in counts.not_counted


def test_every_kind_of_layer_has_its_closed_form():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),  # 8 x 4 x 4 outputs, 2 x 9 each
        nn.ConvTranspose2d(8, 6, 2, stride=2),  # 4 x 4 inputs of 8 channels, 6 x 4 each
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
    )
    counts = count_network(model, torch.zeros(3, 4, 8, 8))
    by_layer = {"0": 3 * 128 * 18, "1": 3 * 16 * 8 * 24, "3": 3 * 384 * 5}
    assert counts.by_layer() == by_layer
    assert counts.macs == sum(by_layer.values())


class Nested(nn.Module):
    """A linear layer that is used twice, and a matrix product outside of it."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6, bias=False)
        self.register_buffer("table", torch.ones(7))

    def forward(self, x):
        y = self.shared(self.shared(x))
        return y @ y.transpose(-1, -2)


def test_products_of_children_do_not_count_for_the_module():
    counts = count_network(nn.Sequential(Nested()), torch.zeros(1, 5, 6))
    assert counts.by_layer() == {"0": 5 * 5 * 6, "0.shared": 2 * 5 * 36}
    assert counts.parameters == 36


def test_attention_is_counted_with_the_steps_of_its_fused_kernel():
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    counts = count_network(layer.eval(), torch.zeros(1, 10, 32))
    assert counts.macs == 10 * 32 * (3 * 32 + 32 + 2 * 64) + 2 * 10 * 10 * 32
    assert torch.backends.mha.get_fastpath_enabled()


def scatter(module, args, out):
    """Scatter an output into zeros, as an expansion does."""
    module.devices.append(out.device.type)
    return out.new_zeros(*out.shape[:1], 9, *out.shape[2:]).index_copy_(1, module.kept, out)


class SharedList(list):
    """A list that is not copied."""

    def __deepcopy__(self, memo):
        return self


def test_hooks_that_read_index_buffers_are_counted_without_data():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(9, 2, 1))
    model[0].register_buffer("kept", torch.tensor([0, 2, 5, 8]), persistent=False)
    model[0].devices = SharedList()
    model[0].register_forward_hook(scatter)
    assert count_network(model, torch.zeros(1, 3, 2, 2)).by_layer() == {"0": 48, "1": 72}
    assert model[0].devices == ["meta"]


def test_the_network_and_its_input_do_not_change():
    model = models.resnet56(num_classes=10).train()
    model.layer1[0].eval()
    modes = [m.training for m in model.modules()]
    before = {name: (id(v), v.clone()) for name, v in [*model.named_parameters(), *model.named_buffers()]}
    example = torch.randn(2, 3, 32, 32)
    copy = example.clone()
    count_network(model, example)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name: id(v) for name, v in after.items()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(example, copy)


class DependsOnValues(nn.Module):
    """A forward pass that depends on a value, which meta tensors do not have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(self.a(x))


def test_a_network_that_depends_on_values_is_counted_with_values():
    assert count_network(DependsOnValues(), torch.ones(1, 4)).by_layer() == {"a": 16}
    assert count_network(DependsOnValues(), -torch.ones(1, 4)).by_layer() == {"a": 16, "b": 16}
    assert count_network(DependsOnValues().double(), torch.ones(1, 4)).macs == 16


class Uncopyable:
    def __deepcopy__(self, memo):
        raise AssertionError("the Trainer was copied")


def test_the_trainer_of_a_module_is_not_copied():
    model = nn.Linear(4, 4)
    model.trainer = Uncopyable()
    assert count_network(model, torch.ones(1, 4)).macs == 16
    assert isinstance(model.trainer, Uncopyable)


class TwoInputs(nn.Module):
    """A module with two positional arguments, one of which holds integers."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, tokens, scale):
        return self.out(self.embed(tokens) * scale)


def test_a_tuple_holds_positional_arguments_and_is_cast_to_the_dtype_of_the_network():
    counts = count_network(TwoInputs().double(), (torch.zeros(1, 6, dtype=torch.long), torch.ones(1)))
    assert counts.macs == 6 * 12
    assert "embedding" in counts.not_counted


def test_an_input_of_a_wrong_shape_is_an_error():
    with pytest.raises(RuntimeError):
        count_network(nn.Linear(4, 4), torch.zeros(1, 5))


def test_bytes_equal_the_size_of_the_file_that_torch_writes():
    state = models.resnet56(num_classes=10).state_dict()
    file = io.BytesIO()
    torch.save(dict(state), file)
    # Every record of the file contains the name of the file, so sizes differ slightly.
    assert abs(state_bytes(state) - len(file.getvalue())) <= 0.02 * len(file.getvalue())
    assert state_bytes({"a": torch.zeros(50_000)}) - state_bytes({"a": torch.zeros(25_000)}) == pytest.approx(
        100_000, abs=256
    )


def test_a_view_counts_without_its_storage_and_a_tied_tensor_counts_once():
    big = torch.zeros(100_000)
    assert state_bytes({"a": big[:10]}) < 5_000
    assert state_bytes({"a": big, "b": big}) < 1.1 * state_bytes({"a": big})
    assert state_bytes({"a": big, "b": big.clone()}) > 1.9 * state_bytes({"a": big})
    assert state_bytes({"a": torch.zeros(2), "extra": {"epoch": 3}}) > 0
