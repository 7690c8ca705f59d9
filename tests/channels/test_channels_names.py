"""Names of modules may contain any character but a dot."""

import pytest
import torch
from masked_networks import compare_with_masked
from torch import nn

from gflow_pl.channels import trace_channels
from gflow_pl.surgery import apply_structure, structure_of
from gflow_pl.values import ChannelGraph


class Named(nn.Module):
    """A split whose sizes the module keeps, grouped convolutions, and a residual sum; all layers in a `ModuleDict`.

    Args:
        mark: Separates the parts of every name of a layer.
    """

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark
        self.splits = [3, 5]
        layers = {
            "stem": nn.Conv2d(3, 8, 3, padding=1),
            "branch": nn.Conv2d(3, 4, 3, padding=1),
            "back": nn.Conv2d(9, 8, 3, padding=1),
            "norm": nn.BatchNorm2d(8),
            "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=4),
            "head": nn.Linear(8, 2),
        }
        inner = nn.ModuleDict({f"{mark}{name}{mark}0{mark}input": layer for name, layer in layers.items()})
        self.parts = nn.ModuleDict({f"block{mark}1": inner})

    def layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.parts[f"block{self.mark}1"][f"{self.mark}{name}{self.mark}0{self.mark}input"](x)

    def forward(self, x):
        stem = self.layer("stem", x)
        left, right = torch.split(stem, self.splits, 1)
        y = self.layer("back", torch.cat([self.layer("branch", left), right], 1)).relu()
        y = self.layer("norm", y + self.layer("grouped", y)).relu()
        return self.layer("head", y.mean((2, 3)))


@pytest.mark.parametrize("residual", ["expand", "remove"])
@pytest.mark.parametrize("mark", [":", "/", "|", "#", " ", "@", "[", "]", "[0]", ",", "=", "->", "'", "\n", "%", "::"])
def test_names_with_separators_are_traced_pruned_and_reloaded(mark: str, residual: str, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    off, change, graph, small = compare_with_masked(Named(mark), (x,), residual=residual)
    assert graph.coverage() == 1.0, str(graph)
    assert off < 1e-12 < 1e-3 < change
    assert small.splits != [3, 5]
    # Both the structure and the graph survive a file.
    saved = {"structure": structure_of(small).as_dict(), "state": small.state_dict(), "graph": graph.as_dict()}
    torch.save(saved, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)
    fresh = Named(mark).double().eval()
    apply_structure(fresh, loaded["structure"])
    fresh.load_state_dict(loaded["state"])
    assert torch.equal(fresh(x.double()), small(x.double()))
    assert ChannelGraph.from_dict(loaded["graph"]).patches == graph.patches


def test_names_of_groups_differ_even_if_a_layer_has_the_name_of_a_second_group() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {"a": nn.Linear(3, 8), "a:1": nn.Linear(4, 8), "b": nn.Linear(4, 8), "head": nn.Linear(16, 2)}
            )

        def forward(self, x):
            left, right = self.layers["a"](x).chunk(2, 1)
            # The halves must not be coupled: each has a reader of its own that knows its size.
            return self.layers["head"](torch.cat([self.layers["a:1"](left[:, :4]), self.layers["b"](right)], 1))

    class Split(Two):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [3, 5]
            self.layers["a:1"], self.layers["b"] = nn.Linear(3, 8), nn.Linear(5, 8)

        def forward(self, x):
            left, right = torch.split(self.layers["a"](x), self.sizes, 1)
            return self.layers["head"](torch.cat([self.layers["a:1"](left), self.layers["b"](right)], 1))

    names = [group.name for group in trace_channels(Split(), torch.zeros(2, 3)).groups]
    assert names == ["layers.a", "layers.a:2", "layers.a:1", "layers.b"]
