"""Whole networks of torchvision and timm, with all checks of the coverage table."""

import pytest
from zoo import MODES, NAMES, faults, measure

# name, mode, least share of prunable filters
FEW = [
    ("tv:squeezenet1_1", "remove", 1.0),
    ("tv:shufflenet_v2_x0_5", "expand", 1.0),
    ("tv:mobilenet_v2", "expand", 1.0),
    ("tv:mobilenet_v3_small", "remove", 1.0),
    ("tv:mnasnet0_5", "remove", 1.0),
    ("tv:regnet_y_400mf", "remove", 1.0),
    ("tv:efficientnet_b0", "expand", 1.0),
    ("tv:resnet18", "expand", 1.0),
    ("tv:googlenet", "remove", 1.0),
    ("convnext_atto", "remove", 1.0),
    ("fastvit_t8", "expand", 1.0),
    ("edgenext_xx_small", "frozen", 1.0),
    ("mobilevitv2_050", "expand", 0.99),
    ("deit_tiny_patch16_224", "remove", 1.0),
    ("levit_128", "expand", 0.85),
]


@pytest.mark.parametrize(("name", "mode", "share"), FEW, ids=[f"{name}-{mode}" for name, mode, _ in FEW])
def test_fifteen_networks(name, mode, share):
    row = measure(name, mode)
    assert faults(row) == []
    assert row["coverage"] >= share


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_zoo(name, mode):
    assert faults(measure(name, mode)) == []
