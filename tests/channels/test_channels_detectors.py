"""Detectors of torchvision: their forward looks at values, and sizes of later tensors depend on them."""

import pytest
import torch
from masked_networks import masked_network, random_plan, randomize_parameters
from torchvision.models import detection

from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite

# name, number of groups with residual="expand" and with "remove", least share of prunable filters
DETECTORS = [
    ("fasterrcnn_mobilenet_v3_large_320_fpn", 43, 31, 0.8),
    ("ssdlite320_mobilenet_v3_large", 48, 37, 0.8),
    ("fasterrcnn_resnet50_fpn", 58, 39, 0.85),
    ("maskrcnn_resnet50_fpn", 58, 39, 0.8),
    ("keypointrcnn_resnet50_fpn", 58, 39, 0.75),
    ("retinanet_resnet50_fpn", 65, 47, 0.95),
    ("fcos_resnet50_fpn", 65, 47, 0.95),
    ("ssd300_vgg16", 22, 22, 0.65),
]
SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in DETECTORS[2:]]
TARGET = {
    "boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]),
    "labels": torch.tensor([1]),
    "masks": torch.zeros(1, 160, 160, dtype=torch.uint8),
    "keypoints": torch.ones(1, 17, 3),
}


@pytest.mark.parametrize(("name", "num_expand", "num_remove", "least"), [*DETECTORS[:2], *SLOW])
def test_pruned_detectors_equal_masked_ones_and_train(name, num_expand, num_remove, least):
    for residual, num_groups in (("expand", num_expand), ("remove", num_remove)):
        torch.manual_seed(0)
        sizes = {} if "320" in name or "ssd" in name else {"min_size": 160, "max_size": 200}
        model = randomize_parameters(getattr(detection, name)(weights=None, weights_backbone=None, **sizes).double())
        images = [torch.rand(3, 160, 160, dtype=torch.float64) for _ in range(2)]
        graph = trace_channels(model, (images,), residual=residual)
        assert len(graph.groups) == num_groups
        assert graph.coverage() > least
        before = sum(p.numel() for p in model.parameters())
        plan = random_plan(graph, only=lambda group: group.inexact is None)
        masked = masked_network(model, graph, plan).eval()
        rewrite(model, graph, plan)
        assert sum(p.numel() for p in model.parameters()) < 0.9 * before
        with torch.no_grad():
            found, expected = (network.eval()(images) for network in (model, masked))
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours["scores"].sort()[0], theirs["scores"].sort()[0], rtol=1e-9)
        sum(model.train()(images, [TARGET, TARGET]).values()).backward()
