"""Networks of torchvision and timm, and the checks that each has to pass, for the coverage table and for the zoo test.

`measure` returns a row of facts about a model in one mode; `faults` lists what is wrong with a row.
"""

import collections
import contextlib
import copy
import io
import time

import timm
import torch
import torchvision
from masked_networks import masked_network, random_plan, randomize_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gflow_pl.channels import trace, trace_channels
from gflow_pl.surgery import apply_structure, rewrite
from gflow_pl.values import KeepPlan

__all__ = ["MODES", "NAMES", "TIMM", "TORCHVISION", "faults", "measure"]

TORCHVISION = [f"tv:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
TIMM = """bat_resnext26ts botnet26t_256 cait_xxs24_224 caformer_s18 coat_lite_tiny coatnet_0_rw_224 convformer_s18
convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cspdarknet53 cspresnet50 darknet53
davit_tiny deit_tiny_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b eca_nfnet_l0 ecaresnet26t edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw fastvit_t8
fbnetc_100 focalnet_tiny_srf gcresnet33ts gernet_s ghostnet_100 gmixer_24_224 gmlp_s16_224 halonet26t hardcorenas_a
hgnetv2_b0 hrnet_w18_small inception_next_tiny inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_050
legacy_seresnet18 levit_128 mixer_s16_224 mixnet_s mobilenetv4_conv_small mobileone_s0 mobilevit_s mobilevitv2_050
mvitv2_tiny nest_tiny nextvit_small nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 repghostnet_050 repvgg_a0
repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100 selecsls42b semnasnet_075
seresnet18 sequencer2d_s skresnet18 spnasnet_100 starnet_s1 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
tf_efficientnet_b0 tiny_vit_5m_224 tinynet_a tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vit_tiny_patch16_224
visformer_tiny volo_d1_224 vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p16_224""".split()  # noqa: SIM905
NAMES = [*TORCHVISION, *TIMM]
# Settings of `trace_channels`, by the name of the mode.
MODES = {
    "expand": {"residual": "expand"},
    "remove": {"residual": "remove"},
    "frozen": {"residual": "expand", "frozen": "expand"},
}

MAX_COMPARED = 60e6  # outputs of networks with more parameters are not compared
MAX_COMPUTED = 200e6  # pruned networks with more parameters are run on meta tensors only
TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-4  # for networks that cast to float32 in their forward
MIN_CHANGE = 1e-3  # if masking changes the output less than this, the comparison is vacuous
_SMALL_SIDES = (64, 96)


def build(name, seed=0):
    """Return a network with random weights, and the side of the images it was designed for."""
    torch.manual_seed(seed)
    if not name.startswith("tv:"):
        model = timm.create_model(name, pretrained=False)
        return model, model.default_cfg.get("input_size", (3, 224, 224))[-1]
    extra = {"init_weights": False} if name[3:] in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name[3:], weights=None, **extra)
    return model, 299 if "inception" in name else 224


def smallest_side(model, native):
    """Return the side of the smallest images that the network accepts in both modes, for faster comparisons."""
    meta = copy.deepcopy(model).to("meta")
    for size in _SMALL_SIDES:
        with contextlib.suppress(Exception), torch.no_grad():
            for training in (True, False):
                meta.train(training)(torch.zeros(2, 3, size, size, device="meta"))
            return size
    return native


class _Float32Detector(TorchDispatchMode):
    """Detects whether any operator returns a float32 tensor."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found |= any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in tree_leaves(out))
        return out


class _VerificationCount:
    """Counts the verifications of a trace: one more than the graph was recorded again."""

    def __enter__(self):
        self.count, self.check_shapes = 0, trace.Verifier.check_shapes

        def counted(verifier):
            self.count += 1
            return self.check_shapes(verifier)

        trace.Verifier.check_shapes = counted
        return self

    def __exit__(self, *_):
        trace.Verifier.check_shapes = self.check_shapes


def prunable(graph):
    """Return the number of prunable filters of every layer."""
    counts = collections.Counter()
    for group in graph.groups:
        for part in group.layers:
            counts[part.layer] += part.index.size
    return counts


def trace_and_describe(model, size, mode, row):
    """Trace a model, add to its row what the graph shows about the prunable filters, and return the graph."""
    start = time.process_time()
    with _VerificationCount() as verifications:
        device = next(model.parameters()).device
        graph = trace_channels(model, torch.zeros(1, 3, size, size, device=device), **MODES[mode])
    row["seconds"], row["rounds"] = round(time.process_time() - start, 2), verifications.count
    prunable_filters = prunable(graph)
    total = sum(layer.num_filters for layer in graph.layers.values())
    inner = total - sum(layer.num_filters for layer in graph.layers.values() if layer.is_output)
    row["coverage"], row["coverage_all"] = graph.coverage(), sum(prunable_filters.values()) / total
    row["groups"] = len(graph.groups)
    row["inexact"] = sum(group.num_filters for group in graph.groups if group.inexact) / max(graph.num_filters, 1)
    why = collections.Counter()
    for layer, reason in graph.frozen.items():
        if not graph.layers[layer].is_output:
            why[reason] += graph.layers[layer].num_filters - prunable_filters[layer]
    row["why"] = {reason: num / inner for reason, num in why.most_common(3)}
    return graph


def trains(model, size):
    """Run one forward and backward pass in training mode and return whether any parameter has a gradient."""
    device = next(model.parameters()).device
    leaves = [x for x in tree_leaves(model.train()(torch.randn(2, 3, size, size, device=device)))]
    sum(x.float().sum() for x in leaves if isinstance(x, torch.Tensor)).backward()
    return any(p.grad is not None for p in model.parameters())


def distances(model, graph, plan, x):
    """Compare the outputs of the pruned, the masked and the full network.

    Returns:
        Largest difference between pruned and masked, and between masked and full network, both relative; whether the
        pruned network casts to float32; and the pruned network, its structure and its output.
    """
    small = copy.deepcopy(model)
    with torch.no_grad():
        full, masked = model(x), masked_network(model, graph, plan)(x)
        structure = rewrite(small, graph.copy(), plan)
        with _Float32Detector() as float32:
            pruned = small(x)
    off = float((pruned - masked).abs().max() / masked.abs().max())
    change = float((full - masked).abs().max() / full.abs().max())
    return off, change, float32.found, (small, structure, pruned)


def is_rebuilt(name, small, structure, x, out):
    """Return whether a new network with structure and state dict from a file computes the same output bit for bit."""
    file = io.BytesIO()
    torch.save({"structure": structure.as_dict(), "state_dict": small.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = build(name, seed=1)[0].double().eval()
    apply_structure(fresh, loaded["structure"])
    fresh.load_state_dict(loaded["state_dict"])
    with torch.no_grad():
        return torch.equal(fresh(x), out)


def rounds_add_up(model, graph, num=5):
    """Return whether `num` rounds in a row give bit for bit what one rewrite by the product of their plans gives."""
    rounds, at_once, now = copy.deepcopy(model), copy.deepcopy(model), graph.copy()
    for seed in range(num):
        structure = rewrite(rounds, now, random_plan(now, share=0.2, seed=seed))
    kept = {group.name: set(group.kept) for group in now.groups}
    product = KeepPlan(
        {g.name: torch.tensor([unit in kept[g.name] for unit in g.kept], dtype=torch.bool) for g in graph.groups}
    )
    together = rewrite(at_once, graph.copy(), product)
    a, b = rounds.state_dict(), at_once.state_dict()
    are_equal = all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    return are_equal and structure.as_dict() == together.as_dict()


def is_exact(group):
    return group.inexact is None


def measure(name, mode, compare=True):
    """Return all facts about one model in one mode; without `compare`, run the pruned network on meta tensors only."""
    model, native = build(name)
    row = {"model": name, "mode": mode, "params": sum(p.numel() for p in model.parameters())}
    row["on_meta"] = row["params"] > MAX_COMPUTED or not compare
    graph = trace_and_describe(model, native, mode, row)
    size = row["side"] = smallest_side(model, native)
    compared = compare and row["params"] <= MAX_COMPARED
    small = copy.deepcopy(model) if compared else model
    rewrite(small, graph.copy(), random_plan(graph))
    row["params_after"] = sum(p.numel() for p in small.parameters())
    row["trains"] = trains(small.to("meta") if row["on_meta"] else small, size)
    del small
    if not compared:
        return row
    model = randomize_parameters(model.double()).eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row["off"], row["change"], row["float32"], (small, structure, out) = distances(
        model, graph, random_plan(graph, only=is_exact), x
    )
    row["rebuilt"] = is_rebuilt(name, small, structure, x, out)
    del small
    row["adds_up"] = rounds_add_up(model, graph)
    if row["inexact"] and mode != "frozen":
        strict = trace_channels(model, x, exact_only=True, **MODES[mode])
        row["exact_only"] = sum(prunable(strict).values()) / max(sum(prunable(graph).values()), 1)
        row["exact_only_off"] = distances(model, strict, random_plan(strict), x)[0]
    return row


def faults(row):
    """Return a sentence for everything that is wrong with a row."""
    if "error" in row:
        return [row["error"]]
    found = [] if row.get("trains", True) else ["the pruned network does not train"]
    if row["mode"] == "frozen" and row["coverage"] < 1:
        found.append(f"only {row['coverage']:.2%} of the filters are prunable: {row['why']}")
    if "off" not in row:
        return found
    tolerance = FLOAT32_TOLERANCE if row["float32"] else TOLERANCE
    for key in ("off", "exact_only_off"):
        if not row.get(key, 0.0) <= tolerance:
            found.append(f"{key}: {row[key]:.1e} from the masked network")
    if row["inexact"] < 1 and not row["change"] >= MIN_CHANGE:  # otherwise there is no exact unit to compare
        found.append(f"the comparison is vacuous: masking changes {row['change']:.1e}")
    found += ["a fresh network with the structure and the state dict has another output"] * (not row["rebuilt"])
    found += ["five rounds differ from one round with the product of their plans"] * (not row["adds_up"])
    return found
