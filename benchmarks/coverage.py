"""How much of every model of torchvision, and of many timm families, can be pruned, and how exactly.

For every model: trace, remove half of the units of every group at random, rewrite, one forward and backward pass in
training mode; and for models of at most 60 M parameters the rewritten network against its masked twin in float64.
One line of JSON per model and mode goes to a file, so that a run that was stopped goes on; the table is made of it.

    python benchmarks/coverage.py run --results coverage.jsonl [--residual expand remove] [model ...]
    python benchmarks/coverage.py table --results coverage.jsonl --output docs/coverage.md
"""

import argparse
import collections
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from channel_twins import masked_twin, random_plan, randomised

from gflow_pl.channels import trace_channels
from gflow_pl.surgery import rewrite

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
CHECKED = 60e6


def build(name):
    torch.manual_seed(0)
    if not name.startswith("tv:"):
        model = timm.create_model(name, pretrained=False)
        return model, model.default_cfg.get("input_size", (3, 224, 224))[-1]
    extra = {"init_weights": False} if name[3:] in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name[3:], weights=None, **extra)
    return model, 299 if "inception" in name else 224


def coverage_with_outputs(graph):
    prunable = collections.Counter()
    for group in graph.groups:
        for part in group.layers:
            prunable[part.layer] += part.index.size
    return sum(prunable.values()) / max(sum(layer.num_filters for layer in graph.layers.values()), 1)


def trained(model, size):
    out = model.train()(torch.randn(2, 3, size, size))
    leaves = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
    sum(x.float().sum() for x in leaves).backward()


def check(model, size, residual, exact_only=False):
    """Relative distances in float64: pruned to masked, and masked to full."""
    model = randomised(model.double()).eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    graph = trace_channels(model, x, residual=residual, exact_only=exact_only)
    plan = random_plan(graph, only=lambda group: group.inexact is None)
    with torch.no_grad():
        full, masked = model(x), masked_twin(model, graph, plan)(x)
        rewrite(model, graph, plan)
        pruned = model(x)
    return float((pruned - masked).abs().max() / masked.abs().max()), float(
        (full - masked).abs().max() / full.abs().max()
    )


def measure(name, residual):
    model, size = build(name)
    row = {"model": name, "residual": residual, "params": sum(p.numel() for p in model.parameters())}
    start = time.process_time()
    graph = trace_channels(model, torch.zeros(1, 3, size, size), residual=residual)
    row["seconds"] = round(time.process_time() - start, 2)
    row["groups"] = len(graph.groups)
    row["coverage"], row["coverage_all"] = graph.coverage(), coverage_with_outputs(graph)
    inexact = sum(group.num_filters for group in graph.groups if group.inexact)
    row["inexact"] = inexact / max(graph.num_filters, 1)
    why = collections.Counter()
    for layer, reason in graph.frozen.items():
        if not graph.layers[layer].is_output:
            why[reason] += graph.layers[layer].num_filters
    row["why"] = why.most_common(1)[0][0] if why else ""
    small = copy.deepcopy(model) if row["params"] <= CHECKED else model
    rewrite(small, graph.copy(), random_plan(graph))
    row["params_after"] = sum(p.numel() for p in small.parameters())
    trained(small, size)
    row["trains"] = True
    if row["params"] <= CHECKED:
        row["off"], row["change"] = check(model, size, residual)
    return row


def run(options):
    path = Path(options.results)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["model"], row["residual"]) for row in rows}
    for name in options.models or [*TORCHVISION, *TIMM]:
        for residual in options.residual:
            if (name, residual) in done:
                continue
            try:
                row = measure(name, residual)
            except Exception as error:
                row = {"model": name, "residual": residual, "error": f"{type(error).__name__}: {error}"[:200]}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def table(options):
    rows = [json.loads(line) for line in Path(options.results).read_text().splitlines()]
    good = [row for row in rows if "error" not in row]
    lines = ["# Coverage and exactness", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    for residual in sorted({row["residual"] for row in rows}):
        for library, here in (("torchvision", True), ("timm", False)):
            part = [row for row in good if row["residual"] == residual and row["model"].startswith("tv:") == here]
            if part:
                medians = [statistics.median(row[key] for row in part) for key in ("coverage", "coverage_all")]
                lines.append(
                    f'- `residual="{residual}"`, {library}: {len(part)} models, median share of filters that can be pruned '
                    f"{medians[0]:.1%}, with the model's outputs counted {medians[1]:.1%}."
                )
    lines += [
        "",
        "| model | residual | M params | after | share | outputs counted | inexact | off twin | change | s | most frozen by |",
    ]
    lines.append("| --- " * 11 + "|")
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['residual']} | {row['error']} |" + " |" * 8)
            continue
        off = f"{row['off']:.0e}" if "off" in row else "-"
        change = f"{row['change']:.2f}" if "change" in row else "-"
        lines.append(
            f"| {row['model']} | {row['residual']} | {row['params'] / 1e6:.1f} | {row['params_after'] / 1e6:.1f} "
            f"| {row['coverage']:.0%} | {row['coverage_all']:.0%} | {row['inexact']:.0%} | {off} | {change} "
            f"| {row['seconds']} | {row['why']} |"
        )
    Path(options.output).write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("models", nargs="*", help="tv:NAME or a timm name; all where none is named")
    parser.add_argument("--results", default="coverage.jsonl")
    parser.add_argument("--residual", nargs="+", default=["expand", "remove"], choices=["expand", "remove"])
    parser.add_argument("--output", default="docs/coverage.md")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    (run if options.what == "run" else table)(options)


if __name__ == "__main__":
    main()
