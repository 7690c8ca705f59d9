"""Networks of torchvision and timm, and everything that a network must stand: the coverage table and the zoo test alike.

A row of facts is measured for a model in one mode; `faults` says what is wrong with a row.
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
convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cspdarknet53 cspresnet50 darknet53 davit_tiny
deit_tiny_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_lite0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw fastvit_t8 fbnetc_100 focalnet_tiny_srf
gcresnet33ts gernet_s ghostnet_100 gmixer_24_224 gmlp_s16_224 halonet26t hardcorenas_a hgnetv2_b0 hrnet_w18_small
inception_next_tiny inception_resnet_v2 inception_v4 lambda_resnet26t lcnet_050 legacy_seresnet18 levit_128 mixer_s16_224 mixnet_s
mobilenetv4_conv_small mobileone_s0 mobilevit_s mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nfnet_l0 pit_ti_224 poolformer_s12
pvt_v2_b0 regnetx_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100
selecsls42b semnasnet_075 seresnet18 sequencer2d_s skresnet18 spnasnet_100 starnet_s1 swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 tf_efficientnet_b0 tiny_vit_5m_224 tinynet_a tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
vit_tiny_patch16_224 visformer_tiny volo_d1_224 vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p16_224""".split()  # noqa: SIM905
NAMES = [*TORCHVISION, *TIMM]
# what is asked of trace_channels, by the name of the mode
MODES = {
    "expand": {"residual": "expand"},
    "remove": {"residual": "remove"},
    "frozen": {"residual": "expand", "frozen": "expand"},
}

COMPARED = 60e6  # parameters up to which outputs are compared
COMPUTED = 200e6  # parameters up to which the pruned network is trained on real tensors
EXACT = 1e-12
IN_FLOAT32 = 1e-4  # for networks that cast to float32 inside
TELLING = 1e-3  # a plan that changes less than this would show nothing
_SMALLER = (64, 96)


def build(name, seed=0):
    """A network without trained weights, and the side of the images it was made for."""
    torch.manual_seed(seed)
    if not name.startswith("tv:"):
        model = timm.create_model(name, pretrained=False)
        return model, model.default_cfg.get("input_size", (3, 224, 224))[-1]
    extra = {"init_weights": False} if name[3:] in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name[3:], weights=None, **extra)
    return model, 299 if "inception" in name else 224


def side(model, native):
    """The smallest images that the network takes in both modes: the channels are the same, and the check is quicker."""
    meta = copy.deepcopy(model).to("meta")
    for size in _SMALLER:
        with contextlib.suppress(Exception), torch.no_grad():
            for training in (True, False):
                meta.train(training)(torch.zeros(2, 3, size, size, device="meta"))
            return size
    return native


class _Kinds(TorchDispatchMode):
    """Notes whether any op gives float32."""

    float32 = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.float32 |= any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in tree_leaves(out))
        return out


class _Rounds:
    """Counts how often the probe had the network surveyed again."""

    def __enter__(self):
        self.count, self.shapes = 0, trace.Verifier.check_shapes

        def counted(probe):
            self.count += 1
            return self.shapes(probe)

        trace.Verifier.check_shapes = counted
        return self

    def __exit__(self, *_):
        trace.Verifier.check_shapes = self.shapes


def prunable(graph):
    """Filters that can go, by layer."""
    counts = collections.Counter()
    for group in graph.groups:
        for part in group.layers:
            counts[part.layer] += part.index.size
    return counts


def traced(model, size, mode, row):
    """The graph, and what it says about the share of channels that can go."""
    start = time.process_time()
    with _Rounds() as rounds:
        device = next(model.parameters()).device
        graph = trace_channels(model, torch.zeros(1, 3, size, size, device=device), **MODES[mode])
    row["seconds"], row["rounds"] = round(time.process_time() - start, 2), rounds.count
    free = prunable(graph)
    total = sum(layer.num_filters for layer in graph.layers.values())
    inner = total - sum(layer.num_filters for layer in graph.layers.values() if layer.is_output)
    row["coverage"], row["coverage_all"] = graph.coverage(), sum(free.values()) / total
    row["groups"] = len(graph.groups)
    row["inexact"] = sum(group.num_filters for group in graph.groups if group.inexact) / max(graph.num_filters, 1)
    why = collections.Counter()
    for layer, reason in graph.frozen.items():
        if not graph.layers[layer].is_output:
            why[reason] += graph.layers[layer].num_filters - free[layer]
    row["why"] = {reason: num / inner for reason, num in why.most_common(3)}
    return graph


def trained(model, size):
    """One forward and backward pass in training mode; every parameter that is left gets its gradient."""
    device = next(model.parameters()).device
    leaves = [x for x in tree_leaves(model.train()(torch.randn(2, 3, size, size, device=device)))]
    sum(x.float().sum() for x in leaves if isinstance(x, torch.Tensor)).backward()
    return any(p.grad is not None for p in model.parameters())


def distances(model, graph, plan, x):
    """Pruned to masked, masked to full, both relative; the pruned network, its structure, its output."""
    small = copy.deepcopy(model)
    with torch.no_grad():
        full, masked = model(x), masked_network(model, graph, plan)(x)
        structure = rewrite(small, graph.copy(), plan)
        with _Kinds() as kinds:
            pruned = small(x)
    off = float((pruned - masked).abs().max() / masked.abs().max())
    change = float((full - masked).abs().max() / full.abs().max())
    return off, change, kinds.float32, (small, structure, pruned)


def rebuilt(name, small, structure, x, out):
    """Whether a fresh network computes the same to the bit, given the structure from a file and the state dict."""
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
    """Whether `num` rounds in a row give to the bit what one rewrite by the product of their plans gives."""
    step, at_once, now = copy.deepcopy(model), copy.deepcopy(model), graph.copy()
    for seed in range(num):
        in_steps = rewrite(step, now, random_plan(now, share=0.2, seed=seed))
    kept = {group.name: set(group.kept) for group in now.groups}
    product = KeepPlan(
        {g.name: torch.tensor([unit in kept[g.name] for unit in g.kept], dtype=torch.bool) for g in graph.groups}
    )
    together = rewrite(at_once, graph.copy(), product)
    a, b = step.state_dict(), at_once.state_dict()
    alike = all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    return alike and in_steps.as_dict() == together.as_dict()


def exact(group):
    return group.inexact is None


def measure(name, mode, compare=True):
    """Everything that is to be known of one model in one mode; shapes alone, if nothing is to be compared."""
    model, native = build(name)
    row = {"model": name, "mode": mode, "params": sum(p.numel() for p in model.parameters())}
    row["on_meta"] = row["params"] > COMPUTED or not compare
    graph = traced(model, native, mode, row)
    size = row["side"] = side(model, native)
    compared = compare and row["params"] <= COMPARED
    small = copy.deepcopy(model) if compared else model
    rewrite(small, graph.copy(), random_plan(graph))
    row["params_after"] = sum(p.numel() for p in small.parameters())
    row["trains"] = trained(small.to("meta") if row["on_meta"] else small, size)
    del small
    if not compared:
        return row
    model = randomize_parameters(model.double()).eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row["off"], row["change"], row["float32"], (small, structure, out) = distances(
        model, graph, random_plan(graph, only=exact), x
    )
    row["rebuilt"] = rebuilt(name, small, structure, x, out)
    del small
    row["adds_up"] = rounds_add_up(model, graph)
    if row["inexact"] and mode != "frozen":
        strict = trace_channels(model, x, exact_only=True, **MODES[mode])
        row["exact_only"] = sum(prunable(strict).values()) / max(sum(prunable(graph).values()), 1)
        row["exact_only_off"] = distances(model, strict, random_plan(strict), x)[0]
    return row


def faults(row):
    """What a row shows that must not be."""
    if "error" in row:
        return [row["error"]]
    found = [] if row.get("trains", True) else ["the pruned network does not train"]
    if row["mode"] == "frozen" and row["coverage"] < 1:
        found.append(f"only {row['coverage']:.2%} of the filters can go: {row['why']}")
    if "off" not in row:
        return found
    allowed = IN_FLOAT32 if row["float32"] else EXACT
    for key in ("off", "exact_only_off"):
        if not row.get(key, 0.0) <= allowed:
            found.append(f"{key}: {row[key]:.1e} from the masked twin")
    if row["inexact"] < 1 and not row["change"] >= TELLING:  # else there is no exact unit to compare
        found.append(f"the comparison is vacuous: masking changes {row['change']:.1e}")
    found += ["a fresh network with structure and state dict computes something else"] * (not row["rebuilt"])
    found += ["five rounds are not one by the product of their plans"] * (not row["adds_up"])
    return found
