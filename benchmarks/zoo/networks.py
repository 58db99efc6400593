"""The networks: per package, names and a function that builds one.

Weights are random, configurations small, and nothing is downloaded.  A builder returns the module and the shape of a
sample; a package that is not installed has no networks.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Built = tuple[nn.Module, Shape]
Family = tuple[Callable[[], Iterable[str]], Callable[[str], Built]]

FAMILIES: dict[str, Family] = {}
PACKAGES = {
    "torch": "torch", "bpnet-lite": "bpnetlite", "braindecode": "braindecode", "torch-ecg": "torch_ecg",
    "timm": "timm", "transformers": "transformers", "segmentation": "segmentation_models_pytorch", "monai": "monai",
    "vit-pytorch": "vit_pytorch", "torchvision": "torchvision",
}  # fmt: skip


def family(package: str) -> Callable[[Callable[[], Family]], Callable[[], Family]]:
    """Register the networks of a package, if it is installed."""

    def enter(make: Callable[[], Family]) -> Callable[[], Family]:
        if importlib.util.find_spec(PACKAGES[package]) is not None:
            FAMILIES[package] = make()
        return make

    return enter


def names(packages: Iterable[str] | None = None) -> list[str]:
    """All networks, as ``package/name``."""
    found = []
    for package, (listed, _) in FAMILIES.items():
        if packages is None or package in packages:
            try:
                found += [f"{package}/{name}" for name in listed()]
            except ImportError as error:
                print(f"{package} is left out: {error}", file=sys.stderr)
    return found


def build(name: str) -> Built:
    """A network by its name, and the shape of a sample.  The caller has seeded torch."""
    package, own = name.split("/", 1)
    return FAMILIES[package][1](own)


class Apply(nn.Module):
    """A module, and functions that prepare its input and pick one tensor of its output."""

    def __init__(
        self,
        module: nn.Module,
        before: Callable[[Tensor], Any] | None = None,
        after: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.before, self.after = module, before, after

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x if self.before is None else self.before(x))
        return y if self.after is None else self.after(y)


def first(y: Any) -> Tensor:
    return y[0]


def table(entries: dict[str, Callable[[], Built]]) -> Family:
    return lambda: list(entries), lambda name: entries[name]()


# ---------------------------------------------------------------------------------------------------------------
# torch itself


@family("torch")
def _torch() -> Family:
    def recurrent(kind: type[nn.RNNBase], layers: int = 1, both: bool = False) -> Built:
        net = kind(12, 32, layers, batch_first=True, bidirectional=both)
        head = nn.Linear(32 * (1 + both), 4)
        return nn.Sequential(Apply(net, after=lambda y: y[0][:, -1]), head), (60, 12)

    def encoder() -> Built:
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40 * 32, 4)), (
            40,
            8,
        )

    def mlp() -> Built:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)), (64,)

    def cnn() -> Built:
        parts = [nn.Conv1d(3, 16, 7, padding=3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(16, 32, 5)]
        return nn.Sequential(*parts, nn.ELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4)), (3, 200)

    return table({
        "mlp": mlp, "cnn1d": cnn, "transformer-encoder": encoder, "lstm": lambda: recurrent(nn.LSTM),
        "gru": lambda: recurrent(nn.GRU), "rnn": lambda: recurrent(nn.RNN),
        "bilstm": lambda: recurrent(nn.LSTM, both=True), "lstm-2-layers": lambda: recurrent(nn.LSTM, 2),
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Genomics


@family("bpnet-lite")
def _bpnet() -> Family:
    def bpnet(**options: Any) -> nn.Module:
        from bpnetlite.bpnet import BPNet

        settings = {"n_filters": 64, "n_layers": 8, "n_control_tracks": 0, "verbose": False, "trimming": 150}
        return BPNet(**{**settings, **options})

    def wrapped(wrapper: str, index: int | None, **options: Any) -> Callable[[], Built]:
        def make() -> Built:
            module = importlib.import_module("bpnetlite.bpnet")
            net = bpnet(**options)
            net = getattr(module, wrapper)(net) if wrapper else net
            return Apply(net, after=None if index is None else lambda y: y[index]), (4, 1000)

        return make

    def chrom(index: int) -> Callable[[], Built]:
        def make() -> Built:
            from bpnetlite.chrombpnet import ChromBPNet

            bias = bpnet(n_filters=32, n_layers=4, n_outputs=1)
            return Apply(ChromBPNet(bias, bpnet(n_outputs=1), name="zoo"), after=lambda y: y[index]), (4, 1000)

        return make

    return table({
        "BPNet-profile": wrapped("", 0), "BPNet-counts": wrapped("", 1),
        "BPNet-control-profile": wrapped("ControlWrapper", 0, n_control_tracks=2),
        "BPNet-control-counts": wrapped("ControlWrapper", 1, n_control_tracks=2),
        "ProfileWrapper": wrapped("ProfileWrapper", None), "CountWrapper": wrapped("CountWrapper", None),
        "ChromBPNet-profile": chrom(0), "ChromBPNet-counts": chrom(1),
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Time series and signals


@family("braindecode")
def _braindecode() -> Family:
    def mandatory() -> dict[str, tuple[list[str], Any]]:
        from braindecode.models.util import models_mandatory_parameters

        return {name: (required, given) for name, required, given in models_mandatory_parameters}

    def options(name: str) -> dict[str, Any]:
        from braindecode.models.util import _get_signal_params

        required, given = mandatory()[name]
        chosen: dict[str, Any] = _get_signal_params(given, required)
        if given is None and "chs_info" in chosen:
            rng = np.random.default_rng(2)
            chosen["chs_info"] = [{"ch_name": f"C{i}", "kind": "eeg", "loc": rng.random(12)} for i in range(1, 20)]
        if given is None and "n_chans" in chosen:
            chosen["n_chans"] = 19 if "chs_info" in chosen else 22
        if "n_outputs" in required:
            chosen.setdefault("n_outputs", 4)
        return chosen

    def published(name: str) -> dict[str, Any] | None:
        """The sizes in the package's own table of parameter counts, which are those of papers."""
        models = importlib.import_module("braindecode.models")
        assert models.__file__
        with open(Path(models.__file__).parent / "summary.csv", encoding="utf-8-sig") as file:
            rows = {row["Model"].strip(): row["get_#Parameters"] for row in csv.DictReader(file)}
        call = rows.get(name, "")
        numbers = dict(part.split("=", 1) for part in call.partition("(")[2].rstrip(") ").split(",") if "=" in part)
        try:
            sizes = {key.strip(): float(value) if "." in value else int(value) for key, value in numbers.items()}
        except ValueError:  # a value that is no number
            return None
        return {**sizes, "n_times": min(int(sizes["n_times"]), 3000)} if "n_times" in sizes else None

    def make(name: str) -> Built:
        models = importlib.import_module("braindecode.models")
        required, given = mandatory()[name]
        chosen = published(name) if given is None and "chs_info" not in required else None
        try:
            net = getattr(models, name)(**(chosen or options(name)))
        except Exception:  # the table has sizes that the class does not take
            chosen = None
            net = getattr(models, name)(**options(name))
        chosen = chosen or options(name)
        channels = chosen.get("n_chans") or len(chosen.get("chs_info") or range(22))
        seconds = chosen.get("input_window_seconds", 0) * chosen.get("sfreq", 0)
        return net, (int(channels), int(chosen.get("n_times") or seconds or 1000))

    # Filter banks and spectrograms of torchaudio, whose library is compiled for another torch; and a download.
    left_out = ("FBCNet", "FBMSNet", "FBLightConvNet", "IFNet", "MetaNeuromotorHand", "EMG2QwertyNet", "REVE")
    return lambda: [name for name in mandatory() if name not in left_out], make


@family("torch-ecg")
def _torch_ecg() -> Family:
    cnns = ("multi_scopic", "resnet_nature_comm_bottle_neck_se", "mobilenet_v3", "resnet_nature_comm", "resnetNS")
    cnns += ("resnet_nature_comm_gc", "resnet_nature_comm_nl", "tresnetF", "regnet_S", "vgg16_swish", "mobilenet_v1")
    cnns += ("xception_vanilla", "densenet_vanilla", "resnet_leadwise")
    necks = ("lstm_se", "lstm_none", "none_transformer", "linear_sa", "none_gc")
    classes = list("abcde")

    def crnn(cnn: str, rnn: str = "none", attention: str = "none") -> Built:
        from torch_ecg.model_configs import ECG_CRNN_CONFIG
        from torch_ecg.models import ECG_CRNN

        config = _copied(ECG_CRNN_CONFIG)
        config.cnn.name, config.rnn.name, config.attn.name = cnn, rnn, attention
        return ECG_CRNN(classes, 12, config), (12, 400)

    def other(model: str, config: str, length: int) -> Callable[[], Built]:
        def make() -> Built:
            configs = importlib.import_module("torch_ecg.model_configs")
            models = importlib.import_module("torch_ecg.models")
            return getattr(models, model)(classes, 12, _copied(getattr(configs, config))), (12, length)

        return make

    def intervals(config: str) -> Callable[[], Built]:
        def make() -> Built:
            configs, models = (importlib.import_module(f"torch_ecg.{part}") for part in ("model_configs", "models"))
            net = models.RR_LSTM(["n", "a"], _copied(getattr(configs, config)))
            net.clf = nn.Identity()  # it decodes to labels, which have no gradient
            return Apply(net, before=lambda x: x.transpose(0, 1)), (30, 1)  # it reads [T, N, 1]

        return make

    entries: dict[str, Callable[[], Built]] = {
        "UNET": other("ECG_UNET", "ECG_UNET_VANILLA_CONFIG", 512),
        "SUBTRACT_UNET": other("ECG_SUBTRACT_UNET", "ECG_SUBTRACT_UNET_CONFIG", 500),
        "SEQ_LAB": other("ECG_SEQ_LAB_NET", "ECG_SEQ_LAB_NET_CONFIG", 500),
        "RR_LSTM": intervals("RR_LSTM_CONFIG"),
        "RR_LSTM_crf": intervals("RR_AF_CRF_CONFIG"),
    }
    entries |= {f"CRNN-{cnn}": (lambda cnn=cnn: crnn(cnn)) for cnn in cnns}
    entries |= {f"CRNN-{n}": (lambda n=n: crnn("resnet_nature_comm", *n.split("_"))) for n in necks}
    return table(entries)


def _copied(config: Any) -> Any:
    from copy import deepcopy

    return deepcopy(config)


# ---------------------------------------------------------------------------------------------------------------
# Images


def of_size(side: int, channels: int = 3) -> Shape:
    return channels, side, side


@family("timm")
def _timm() -> Family:
    small = (
        "resnet18", "resnet26t", "resnetv2_50", "mobilenetv3_small_050", "efficientnet_b0", "ghostnet_050",
        "convnext_atto", "convnextv2_atto", "regnetx_002", "densenet121", "vgg11_bn", "mixer_s32_224",
        "resmlp_12_224", "gmlp_ti16_224",
        "vit_tiny_patch16_224", "deit_tiny_patch16_224", "cait_xxs24_224", "poolformer_s12", "edgenext_xx_small",
        "mobilevit_xxs", "levit_128s", "xcit_nano_12_p16_224", "repvgg_a0", "fastvit_t8", "coatnet_nano_rw_224",
        "swin_tiny_patch4_window7_224", "pvt_v2_b0", "tiny_vit_5m_224", "efficientformer_l1", "crossvit_tiny_240",
    )  # fmt: skip

    def make(name: str) -> Built:
        import timm

        known = timm.get_pretrained_cfg(name)
        side = 64 if known is None or not known.fixed_input_size else known.input_size[-1]
        return timm.create_model(name, pretrained=False, num_classes=10), of_size(side)

    return lambda: small, make


@family("torchvision")
def _torchvision() -> Family:
    small = ("alexnet", "resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v2", "googlenet")

    def make(name: str) -> Built:
        models = importlib.import_module("torchvision.models")
        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return getattr(models, name)(weights=None, num_classes=10, **extra), of_size(64)

    return lambda: small, make


@family("vit-pytorch")
def _vit_pytorch() -> Family:
    size = {"image_size": 64, "patch_size": 16, "num_classes": 4, "dim": 64, "depth": 2, "heads": 4}
    entries: dict[str, tuple[str, str, dict[str, Any]]] = {
        "ViT": ("vit_pytorch", "ViT", {**size, "mlp_dim": 128}),
        "SimpleViT": ("vit_pytorch.simple_vit", "SimpleViT", {**size, "mlp_dim": 128}),
        "DeepViT": ("vit_pytorch.deepvit", "DeepViT", {**size, "mlp_dim": 128}),
        "CaiT": ("vit_pytorch.cait", "CaiT", {**size, "cls_depth": 1, "mlp_dim": 128}),
        "CCT": ("vit_pytorch.cct", "CCT", {
            "img_size": 64, "embedding_dim": 64, "n_conv_layers": 1, "num_layers": 2, "num_heads": 4,
            "num_classes": 4, "positional_embedding": "learnable",
        }),
    }  # fmt: skip

    def make(name: str) -> Built:
        module, kind, options = entries[name]
        return getattr(importlib.import_module(module), kind)(**options), of_size(64)

    return lambda: list(entries), make


@family("segmentation")
def _segmentation() -> Family:
    kinds = ("Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "MAnet")

    def make(name: str) -> Built:
        package = importlib.import_module("segmentation_models_pytorch")
        return getattr(package, name)("resnet18", encoder_weights=None, classes=2), of_size(64)

    return lambda: kinds, make


@family("monai")
def _monai() -> Family:
    gray, volume = of_size(64, 1), (1, 16, 16, 16)
    flat = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    solid = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    levels = {"channels": (8, 16, 32), "strides": (2, 2)}
    vit = {"img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 64, "mlp_dim": 128, "num_layers": 2}
    entries: dict[str, tuple[dict[str, Any], Shape]] = {
        "UNet": ({**flat, **levels}, gray),
        "BasicUNet": ({**flat, "features": (8, 8, 16, 32, 64, 8)}, gray),
        "AttentionUnet": ({**flat, **levels}, gray),
        "SegResNet": ({**flat, "init_filters": 8}, gray),
        "DenseNet121": ({**flat, "out_channels": 4}, gray),
        "SEResNet50": ({"spatial_dims": 2, "in_channels": 3, "num_classes": 4}, of_size(64)),
        "HighResNet": (solid, volume),
        "VNet": (solid, (1, 32, 32, 32)),
        "UNet-3d": ({**solid, **levels}, volume),
        "ViT": (
            {**vit, "in_channels": 1, "num_heads": 4, "classification": True, "num_classes": 4, "spatial_dims": 2},
            of_size(32, 1),
        ),
    }

    def make(name: str) -> Built:
        options, shape = entries[name]
        kind = getattr(importlib.import_module("monai.networks.nets"), name.removesuffix("-3d"))
        pick = first if name == "ViT" else None
        return Apply(kind(**options), after=pick), shape

    return lambda: list(entries), make


# ---------------------------------------------------------------------------------------------------------------
# Text and speech: embedded tokens are differentiated


@family("transformers")
def _transformers() -> Family:
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    gpt = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    text: dict[str, dict[str, Any]] = {
        "Bert": tiny, "Roberta": tiny, "Electra": {**tiny, "embedding_size": 64}, "DistilBert": {
            "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        "Albert": {**tiny, "embedding_size": 64}, "GPT2": gpt, "GPTNeoX": tiny,
        "Llama": {**tiny, "num_key_value_heads": 2}, "Mistral": {**tiny, "num_key_value_heads": 2}, "ConvBert": {
            **tiny, "embedding_size": 64},
    }  # fmt: skip
    images = {"ViT": {**tiny, "image_size": 32, "patch_size": 8}, "DeiT": {**tiny, "image_size": 32, "patch_size": 8}}
    audio = {
        "Wav2Vec2": {**tiny, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
                     "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    }  # fmt: skip

    def config(package: Any, name: str, options: dict[str, Any]) -> Any:
        return getattr(package, f"{name}Config")(**options)

    def make(name: str) -> Built:
        package = importlib.import_module("transformers")
        if name in images:
            net = getattr(package, f"{name}ForImageClassification")(config(package, name, images[name]))
            return Apply(net, after=lambda y: y.logits), of_size(32)
        if name in audio:
            net = getattr(package, f"{name}Model")(config(package, name, audio[name]))
            return Apply(net, after=lambda y: y.last_hidden_state), (2000,)
        net = getattr(package, f"{name}Model")(config(package, name, {"vocab_size": 100, **text[name]}))
        return Embedded(net), (16, 64)

    return lambda: [*text, *images, *audio], make


class Embedded(nn.Module):
    """A language model at embedded tokens; its output is the last hidden state of the first token."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(inputs_embeds=x)[0][:, -1]


def randomized(net: nn.Module) -> nn.Module:
    """Batch norms get running statistics and scales that are no identity, and the network is in evaluation mode."""
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            assert part.running_var is not None
            with torch.no_grad():
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
                if part.affine:
                    part.weight.uniform_(0.5, 1.5)
    return net.eval()
