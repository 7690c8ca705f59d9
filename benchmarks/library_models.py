"""Small models with random weights of other libraries, by name, for `library_coverage.py`.

Every builder returns a model and its inputs. Libraries are imported when a model of theirs is built: install those to
measure (``pip install gflow_pl[zoo]``).
"""

import functools
import importlib

import torch
from torch import nn

__all__ = ["CASTS", "MODELS", "library_of"]

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_TEXT, **_TOKENS, "num_key_value_heads": 2}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}


def _ids():
    return torch.arange(2 * 7).view(2, 7) % 90 + 3


def _images(side=32, channels=3):
    return torch.randn(2, channels, side, side)


class _Outputs(nn.Module):
    """A model of transformers whose forward takes positional arguments, and returns what is not a cache."""

    def __init__(self, net, names):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, *inputs):
        found = self.net(**dict(zip(self.names, inputs, strict=True)))
        keys = ("logits", "pred_boxes", "logits_per_image", "last_hidden_state")
        return [value for value in map(found.get, keys) if value is not None]


def _transformers(kind, head, settings, inputs, **overrides):
    """Return a model of transformers: ``{kind}{head}`` with ``{kind}Config``."""
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    config = getattr(library, f"{kind}Config")(**{**settings, **overrides})
    given = {name: make() for name, make in inputs.items()}
    return _Outputs(getattr(library, f"{kind}{head}")(config), list(given)), tuple(given.values())


def _clip():
    library = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    text, vision = {**_TEXT, "projection_dim": 16}, {**_VISION, "projection_dim": 16}
    config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return _Outputs(library.CLIPModel(config), ["input_ids", "pixel_values"]), (_ids(), _images())


def _detr():
    library = importlib.import_module("transformers")
    backbone = library.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])
    without = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return _transformers(
        "Detr", "ForObjectDetection", _SEQ2SEQ, {"pixel_values": lambda: _images(64)},
        num_queries=5, backbone_config=backbone, **without,
    )  # fmt: skip


class _Sampled(nn.Module):
    """A model of diffusers that returns its sample."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *inputs):
        return self.net(*inputs).sample


def _diffusers(kind, inputs, **settings):
    library = importlib.import_module("diffusers")
    return _Sampled(getattr(library, kind)(**settings)), inputs()


class _Raw(nn.Module):
    """A detector of ultralytics in training mode: it returns its raw maps."""

    def __init__(self, config, side):
        super().__init__()
        tasks = importlib.import_module("ultralytics.nn.tasks")
        kind = tasks.RTDETRDetectionModel if "rtdetr" in config else tasks.DetectionModel
        self.net = kind(config, ch=3, nc=5, verbose=False)

    def forward(self, x):
        return self.net(x)


def _built(path, *args, inputs, **settings):
    """Return an object of a library by its path, and its inputs."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(*args, **settings), inputs()


def _graph_net(layer, **settings):
    geometric = importlib.import_module("torch_geometric.nn")

    class Net(nn.Module):
        """Two layers of a graph network."""

        def __init__(self):
            super().__init__()
            kind = getattr(geometric, layer)
            self.a, self.b, self.o = kind(5, 16, **settings), kind(16, 12, **settings), nn.Linear(12, 3)

        def forward(self, x, edges):
            return self.o(self.b(self.a(x, edges).relu(), edges).relu())

    return Net(), (torch.randn(9, 5), torch.randint(0, 9, (2, 20)))


_IDS, _PIXELS = {"input_ids": _ids}, {"pixel_values": _images}
_BOTH = {"input_ids": _ids, "decoder_input_ids": _ids}
_CLASSIFIES = {"num_labels": 5}
_text = functools.partial(functools.partial, _transformers)

MODELS = {
    **{
        f"transformers: {kind}": _text(kind, "ForSequenceClassification", {**_TEXT, **_CLASSIFIES}, _IDS)
        for kind in ("Bert", "Roberta", "Albert", "Electra", "DebertaV2", "MPNet", "XLMRoberta", "ConvBert", "Ernie")
    },
    "transformers: DistilBert": _text(
        "DistilBert", "ForSequenceClassification",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, **_CLASSIFIES}, _IDS,
    ),
    **{
        f"transformers: {kind}": _text(kind, "LMHeadModel" if kind == "GPT2" else "ForCausalLM", settings, _IDS)
        for kind, settings in {
            "GPT2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS},
            "GPTNeo": {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                       "attention_types": [[["global", "local"], 1]]},
            "GPTNeoX": _TEXT,
            "GPTJ": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
            "OPT": {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
            "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
            "Falcon": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            "Llama": _GROUPED, "Mistral": _GROUPED, "Qwen2": _GROUPED, "Phi": _GROUPED, "Phi3": _GROUPED,
            "StableLm": _GROUPED, "Olmo": _GROUPED, "Cohere": _GROUPED, "Granite": _GROUPED,
            "Qwen3": {**_GROUPED, "head_dim": 8}, "Gemma": {**_GROUPED, "head_dim": 8},
            "Gemma2": {**_GROUPED, "head_dim": 8},
            "Mamba": {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
            "Mamba2": {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8,
                       "head_dim": 8, "n_groups": 2},
        }.items()
    },
    "transformers: T5": _text(
        "T5", "ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, _BOTH,
    ),
    "transformers: Bart": _text("Bart", "ForConditionalGeneration", _SEQ2SEQ, _BOTH),
    **{
        f"transformers: {kind}": _text(kind, "ForImageClassification", {**settings, **_CLASSIFIES}, _PIXELS)
        for kind, settings in {
            "ViT": _VISION, "DeiT": _VISION, "Beit": _VISION, "Dinov2": {**_VISION, "mlp_ratio": 2},
            "Swin": _SWIN, "Swinv2": _SWIN, "ConvNext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
            "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        }.items()
    },
    "transformers: Segformer": _text(
        "Segformer", "ForSemanticSegmentation",
        {"hidden_sizes": [16, 32, 32, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 4, 4],
         "decoder_hidden_size": 32}, {"pixel_values": lambda: _images(64)},
    ),
    "transformers: MobileViT": _text(
        "MobileViT", "ForImageClassification",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "num_attention_heads": 4,
         "image_size": 64}, {"pixel_values": lambda: _images(64)},
    ),
    "transformers: Whisper": _text(
        "Whisper", "ForConditionalGeneration",
        {**_SEQ2SEQ, **_TOKENS, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20,
         "decoder_start_token_id": 1},
        {"input_features": lambda: torch.randn(2, 16, 40), "decoder_input_ids": _ids},
    ),
    "transformers: Wav2Vec2": _text(
        "Wav2Vec2", "ForCTC",
        {**_TEXT, "vocab_size": 32, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 8],
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        {"input_values": lambda: torch.randn(2, 400)},
    ),
    "transformers: Detr": _detr,
    "transformers: CLIP": _clip,
    "diffusers: UNet2D": functools.partial(
        _diffusers, "UNet2DModel", lambda: (_images(16), torch.tensor([3, 5])), sample_size=16, norm_num_groups=4,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=8,
    ),
    "diffusers: UNet2DCondition": functools.partial(
        _diffusers, "UNet2DConditionModel", lambda: (_images(16, 4), torch.tensor([3, 7]), torch.rand(2, 5, 24)),
        sample_size=16, norm_num_groups=4, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
    ),
    "diffusers: DiT": functools.partial(
        _diffusers, "DiTTransformer2DModel", lambda: (_images(8, 4), torch.tensor([3, 5]), torch.tensor([1, 2])),
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ),
    **{
        f"ultralytics: {name}": lambda config=f"{name}.yaml", side=side: (_Raw(config, side), (_images(side),))
        for name, side in (("yolov8n", 64), ("yolo11n", 64), ("yolo26n", 64), ("rtdetr-l", 64))
    },
    **{
        f"segmentation_models_pytorch: {name}": functools.partial(
            _built, f"segmentation_models_pytorch.{name}", "resnet18", inputs=lambda: (_images(64),),
            encoder_weights=None, classes=4,
        )
        for name in ("Unet", "UnetPlusPlus", "MAnet", "FPN", "DeepLabV3Plus", "PSPNet", "Linknet", "UPerNet")
    },
    "monai: UNet 3-D": functools.partial(
        _built, "monai.networks.nets.UNet", inputs=lambda: (torch.randn(2, 1, 16, 16, 16),), spatial_dims=3,
        in_channels=1, out_channels=3, channels=(8, 16, 32), strides=(2, 2), num_res_units=1,
    ),
    "monai: SegResNet 3-D": functools.partial(
        _built, "monai.networks.nets.SegResNet", inputs=lambda: (torch.randn(2, 1, 16, 16, 16),), spatial_dims=3,
        init_filters=8, in_channels=1, out_channels=3,
    ),
    **{
        f"monai: {name} 3-D": functools.partial(
            _built, f"monai.networks.nets.{name}", inputs=lambda: (torch.randn(1, 1, 32, 32, 32),), in_channels=1,
            out_channels=2, **settings,
        )
        for name, settings in {
            "BasicUNet": {"spatial_dims": 3, "features": (8, 8, 16, 32, 32, 8)},
            "AttentionUnet": {"spatial_dims": 3, "channels": (8, 16, 32), "strides": (2, 2)},
            "UNETR": {"img_size": 32, "feature_size": 8, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4},
            "SwinUNETR": {"feature_size": 12},
        }.items()
    },
    **{
        f"torchvision: {name}": functools.partial(
            _built, f"torchvision.models.segmentation.{name}", inputs=lambda: (_images(64),), weights=None,
            weights_backbone=None, num_classes=4,
        )
        for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    },
    "torchvision: r3d_18": functools.partial(
        _built, "torchvision.models.video.r3d_18", inputs=lambda: (torch.randn(2, 3, 4, 32, 32),), num_classes=4
    ),
    "torchvision: swin3d_t": functools.partial(
        _built, "torchvision.models.video.swin3d_t", inputs=lambda: (torch.randn(1, 3, 4, 64, 64),), num_classes=4
    ),
    "torchvision: raft_small": functools.partial(
        _built, "torchvision.models.optical_flow.raft_small", inputs=lambda: (_images(128)[:1], _images(128)[:1], 2)
    ),
    "torchaudio: Conformer": functools.partial(
        _built, "torchaudio.models.Conformer", inputs=lambda: (torch.rand(2, 12, 16), torch.tensor([12, 9])),
        input_dim=16, num_heads=4, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=5,
    ),
    "torchaudio: ConvTasNet": functools.partial(
        _built, "torchaudio.models.ConvTasNet", inputs=lambda: (torch.rand(2, 1, 320),), enc_num_feats=16,
        msk_num_feats=8, msk_num_hidden_feats=16, msk_num_layers=2, msk_num_stacks=2,
    ),
    "torchaudio: Wav2Letter": functools.partial(
        _built, "torchaudio.models.Wav2Letter", inputs=lambda: (torch.rand(2, 1, 1600),), num_classes=5
    ),
    "torch_geometric: GCNConv": functools.partial(_graph_net, "GCNConv"),
    "torch_geometric: SAGEConv": functools.partial(_graph_net, "SAGEConv"),
    "torch_geometric: GATConv": functools.partial(_graph_net, "GATConv"),
    "torch_geometric: GraphConv": functools.partial(_graph_net, "GraphConv"),
}  # fmt: skip
"""Name of a model to the function that builds it."""
CASTS = {"torchvision: raft_small"}
"""Models that cast to float32 in their forward and do not run in float64."""


def library_of(name):
    """Return the library of a model: the part of its name before the colon."""
    return name.partition(":")[0]
