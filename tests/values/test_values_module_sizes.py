"""Attributes that follow from the shapes of a module's tensors."""

import pytest
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from gflow_pl.values.module_sizes import shape_attributes


@pytest.mark.parametrize(
    ("module", "shapes", "expected"),
    [
        (nn.Conv2d(3, 8, 3), {"weight": (6, 2, 3, 3)}, {"out_channels": 6, "in_channels": 2, "groups": 1}),
        # Whole groups are gone; all groups lost the same positions.
        (nn.Conv2d(8, 8, 3, groups=4), {"weight": (6, 2, 3, 3)}, {"out_channels": 6, "in_channels": 6, "groups": 3}),
        (nn.Conv2d(8, 8, 3, groups=4), {"weight": (4, 1, 3, 3)}, {"out_channels": 4, "in_channels": 4, "groups": 4}),
        (nn.ConvTranspose2d(4, 6, 2), {"weight": (3, 5, 2, 2)}, {"in_channels": 3, "out_channels": 5, "groups": 1}),
        (nn.Linear(4, 6), {"weight": (5, 3)}, {"out_features": 5, "in_features": 3}),
        (
            nn.Bilinear(2, 3, 4),
            {"weight": (4, 1, 2)},
            {"out_features": 4, "in1_features": 1, "in2_features": 2},
        ),
        (nn.BatchNorm2d(8), {"weight": (5,)}, {"num_features": 5}),
        (nn.BatchNorm2d(8, affine=False), {"running_mean": (5,)}, {"num_features": 5}),
        (nn.LayerNorm((4, 8)), {"weight": (4, 5)}, {"normalized_shape": (4, 5)}),
        (nn.GroupNorm(4, 8), {"weight": (4,)}, {"num_channels": 4, "num_groups": 4}),
        (nn.GroupNorm(8, 8), {"weight": (5,)}, {"num_channels": 5, "num_groups": 5}),
        (nn.Embedding(10, 4), {"weight": (10, 3)}, {"num_embeddings": 10, "embedding_dim": 3}),
        (nn.PReLU(8), {"weight": (5,)}, {"num_parameters": 5}),
        (
            nn.LSTM(3, 5, proj_size=2),
            {"weight_ih_l0": (16, 2), "weight_hh_l0": (16, 1), "weight_hr_l0": (1, 4)},
            {"input_size": 2, "hidden_size": 4, "proj_size": 1},
        ),
        (
            nn.GRUCell(3, 5),
            {"weight_ih": (12, 2), "weight_hh": (12, 4)},
            {"input_size": 2, "hidden_size": 4},
        ),
        (
            nn.MultiheadAttention(8, 2),
            {"in_proj_weight": (18, 6)},
            {"embed_dim": 6, "kdim": 6, "vdim": 6, "head_dim": 3},
        ),
        (nn.ReLU(), {}, {}),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), {}, {}),
    ],
)
def test_attributes_follow_from_shapes(module, shapes, expected) -> None:
    assert shape_attributes(module, shapes) == expected


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm]
)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_computed_has_the_shape_of_its_source(wrap) -> None:
    module = wrap(nn.Linear(4, 6))
    own = {name: tuple(x.shape) for name, x in [*module.named_parameters(), *module.named_buffers()]}
    assert shape_attributes(module, own) == {"out_features": 6, "in_features": 4}
