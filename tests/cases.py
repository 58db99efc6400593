"""One table of networks and shapes, shared by the tests and the benchmarks.

`CASES` holds every network by name.  ``case.build()`` gives it in eval mode with seeded weights and *random*
batch-norm statistics (fresh ones, 0 and 1, would hide a wrong fold), ``case.inputs(n)`` gives seeded samples.

* `BENCH` are the five networks of the measured table.
* ``case.opaque`` says that at least one step has no form, so that torch differentiates it.
* ``case.traceable`` is False where a Program must be refused (hidden backward, mixed samples, ...), so that the
  whole network runs on autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.case import Case, Fn, Recipe, lazily, seq1d, seq2d
from tests.support.modules import (
    AttendsToSamples,
    Attention,
    CustomBackward,
    FreezesOne,
    HeadsAsBatches,
    HeadsInFront,
    LeNet5,
    LstmNet,
    LstmSequenceFirst,
    MixesSamples,
    PerStep,
    Residual1d,
    RunningLogMean,
    SequenceFirst,
    SharedConv,
    SkipsAll,
    SqueezeExcite,
    TwoInputs,
    ValueBranch,
    cnn1d,
    cnn1d_strided,
    decoder,
    emulator,
    fcn,
    mlp,
    weight_normed,
)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": lambda x: x * torch.sigmoid(x),
    "mish": F.mish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "square": lambda x: x * x,
    "cube": lambda x: x**3,
    "clamp": lambda x: x.clamp(-0.5, 0.4),
    "safe_log": lambda x: torch.log(torch.clamp(x * x, min=1e-6)),
    "exp": lambda x: torch.exp(-x),
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1),
    "rsqrt": lambda x: torch.rsqrt(x.square() + 0.1),
    "reciprocal": lambda x: 1 / (2 + torch.sin(x)),
    "erf": torch.erf,
    "cos": torch.cos,
}


def _small() -> list[Case]:
    lz, relu = lazily, lazily(nn.ReLU)
    recipes: dict[str, Recipe] = {
        # convolutions
        "conv1d_valid": seq1d(relu, lz(nn.Conv1d, 4, 5, 3), relu),
        "conv1d_stride_pad": seq1d(relu, lz(nn.Conv1d, 4, 5, 5, stride=3, padding=1), relu),
        "conv1d_same_even": seq1d(relu, lz(nn.Conv1d, 4, 5, 4, padding="same"), relu),
        "conv1d_same_dilated_even": seq1d(relu, lz(nn.Conv1d, 4, 5, 4, padding="same", dilation=3), relu),
        "conv1d_dilated": seq1d(relu, lz(nn.Conv1d, 4, 5, 3, dilation=2, padding=2, stride=2), relu),
        "conv1d_groups": seq1d(relu, lz(nn.Conv1d, 4, 6, 3, groups=2), relu),
        "conv1d_depthwise": seq1d(relu, lz(nn.Conv1d, 4, 8, 3, groups=4, bias=False, padding=1), relu),
        "conv1d_nobias": seq1d(relu, lz(nn.Conv1d, 4, 5, 3, bias=False), relu),
        "conv1d_pad_over_kernel": seq1d(relu, lz(nn.Conv1d, 4, 5, 2, padding=3), relu),
        "conv1d_wide_stride": seq1d(relu, lz(nn.Conv1d, 4, 5, 2, stride=5), relu),
        "conv1d_long_kernel": seq1d(relu, lz(nn.Conv1d, 4, 3, 39, padding=19), relu, length=24),
        "conv1d_circular": seq1d(relu, lz(nn.Conv1d, 4, 5, 3, padding=1, padding_mode="circular"), relu),
        "conv2d_valid": seq2d(relu, lz(nn.Conv2d, 4, 5, 3), relu),
        "conv2d_uneven": seq2d(relu, lz(nn.Conv2d, 4, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), relu),
        "conv2d_same_even": seq2d(relu, lz(nn.Conv2d, 4, 5, (4, 3), padding="same"), relu),
        "conv2d_along_rows": seq2d(lz(nn.Conv2d, 4, 5, (9, 1), padding="same"), relu, lz(nn.Conv2d, 5, 4, (1, 3))),
        "conv2d_depthwise": seq2d(relu, lz(nn.Conv2d, 4, 4, (1, 5), groups=4, bias=False), lz(nn.Conv2d, 4, 6, 1)),
        # activations
        "relu_inplace": seq1d(lz(nn.ReLU, inplace=True), lz(nn.Conv1d, 4, 4, 3), lz(nn.ReLU, inplace=True)),
        "leaky_relu": seq1d(lz(nn.LeakyReLU, 0.2), lz(nn.Conv1d, 4, 4, 3), lz(nn.LeakyReLU, 0.01, inplace=True)),
        "elu": seq1d(lz(nn.ELU), lz(nn.Conv1d, 4, 4, 3), lz(nn.ELU, 0.7, inplace=True)),
        "tanh": seq1d(lz(nn.Tanh), lz(nn.Conv1d, 4, 4, 3), lz(Fn, torch.tanh)),
        "sigmoid": seq1d(lz(nn.Sigmoid), lz(nn.Conv1d, 4, 4, 3), lz(Fn, torch.sigmoid)),
        "affine": seq1d(lz(Fn, lambda x: -(2.0 - 0.5 * x) / 3.0 + 1), relu, lz(Fn, lambda x: 1 - x), lz(Fn, torch.neg)),
        **{f"act_{name}": seq1d(lz(Fn, f), lz(nn.Conv1d, 4, 4, 3), lz(Fn, f)) for name, f in FUNCTIONS.items()},
        "prelu": seq1d(lz(nn.PReLU), lz(nn.Conv1d, 4, 5, 3), lz(nn.PReLU, 5, 0.3)),
        # max pools
        "maxpool1d": seq1d(relu, lz(nn.MaxPool1d, 2), lz(nn.Conv1d, 4, 4, 3), relu),
        "maxpool1d_overlap_pad": seq1d(lz(nn.MaxPool1d, 3, stride=2, padding=1), lz(nn.Tanh)),
        "maxpool1d_ceil": seq1d(relu, lz(nn.MaxPool1d, 3, stride=3, ceil_mode=True), lz(nn.ELU), length=17),
        "maxpool1d_dilated": seq1d(lz(nn.MaxPool1d, 3, stride=1, dilation=2), relu),
        "maxpool2d": seq2d(relu, lz(nn.MaxPool2d, 2), lz(nn.Conv2d, 4, 4, 2), relu),
        "maxpool2d_mixed": seq2d(lz(nn.MaxPool2d, (3, 2), stride=(2, 3), padding=(1, 0), ceil_mode=True), relu),
        "maxpool2d_overlap": seq2d(lz(nn.MaxPool2d, 3, stride=1, padding=1, dilation=1), lz(nn.Tanh)),
        # average pools and means
        "avgpool1d": seq1d(relu, lz(nn.AvgPool1d, 3, stride=2), relu),
        "avgpool1d_pad_count": seq1d(relu, lz(nn.AvgPool1d, 4, stride=3, padding=2, ceil_mode=True), relu),
        "avgpool1d_pad_exclude": seq1d(
            relu, lz(nn.AvgPool1d, 4, stride=3, padding=2, ceil_mode=True, count_include_pad=False), lz(nn.Tanh)
        ),
        "avgpool2d": seq2d(relu, lz(nn.AvgPool2d, (2, 3), stride=(2, 1), padding=(1, 1)), relu),
        "avgpool2d_ceil_exclude": seq2d(
            relu, lz(nn.AvgPool2d, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), lz(nn.Tanh)
        ),
        "avgpool2d_divisor": seq2d(relu, lz(nn.AvgPool2d, 2, divisor_override=3), relu),
        "adaptive1d_one": seq1d(relu, lz(nn.AdaptiveAvgPool1d, 1), lz(nn.Tanh)),
        "adaptive1d_uneven": seq1d(relu, lz(nn.AdaptiveAvgPool1d, 5), lz(nn.Tanh)),
        "adaptive2d_uneven": seq2d(relu, lz(nn.AdaptiveAvgPool2d, (4, 3)), lz(nn.Tanh)),
        "adaptive2d_none": seq2d(relu, lz(nn.AdaptiveAvgPool2d, (None, 2)), lz(nn.Tanh)),
        "adaptive2d_grows": seq2d(relu, lz(nn.AdaptiveAvgPool2d, (11, 1)), lz(nn.Tanh)),
        "mean_last": seq1d(relu, lz(Fn, lambda x: x.mean(-1)), lz(nn.Tanh)),
        "mean_keepdim": seq1d(relu, lz(Fn, lambda x: x.mean(2, keepdim=True)), lz(nn.Tanh)),
        "mean_both": seq2d(relu, lz(Fn, lambda x: x.mean((2, 3))), lz(nn.Tanh)),
        "mean_rows": seq2d(relu, lz(Fn, lambda x: x.mean(2)), lz(nn.Tanh)),
        "mean_columns_keepdim": seq2d(relu, lz(Fn, lambda x: x.mean(-1, keepdim=True)), lz(nn.Tanh)),
        "mean_channels": seq1d(relu, lz(Fn, lambda x: x.mean(1)), lz(nn.Tanh)),
        # views
        "view_channels": seq1d(relu, lz(Fn, lambda x: x.view(x.size(0), 8, 8)), lz(nn.Conv1d, 8, 3, 3), relu),
        "reshape_to_2d": seq1d(relu, lz(Fn, lambda x: x.reshape(-1, 1, 4, 16)), lz(nn.Conv2d, 1, 3, (4, 3)), relu),
        "squeeze": seq2d(
            relu, lz(nn.Conv2d, 4, 5, (9, 1)), lz(Fn, lambda x: x.squeeze(2)), lz(nn.Conv1d, 5, 3, 3), relu
        ),
        "unsqueeze_unflatten": seq1d(
            lz(Fn, lambda x: x.unsqueeze(1)), lz(nn.Conv2d, 1, 2, 3), relu, lz(nn.Unflatten, 3, (2, 7))
        ),
        "flatten_tail": seq2d(relu, lz(nn.Flatten, 2), lz(nn.Conv1d, 4, 3, 5, stride=3), relu),
        # copies
        "transpose": seq1d(relu, lz(Fn, lambda x: x.transpose(1, 2)), lz(nn.Linear, 4, 5), lz(nn.Tanh)),
        "permute_back": seq1d(
            lz(Fn, lambda x: x.permute(0, 2, 1)), lz(nn.LayerNorm, 4), lz(Fn, lambda x: x.mT), lz(nn.Conv1d, 4, 3, 3)
        ),
        "permute_2d": seq2d(relu, lz(Fn, lambda x: x.permute(0, 3, 1, 2)), lz(nn.Conv2d, 8, 3, 2), relu),
        "channels_last_2d": seq2d(relu, lz(Fn, lambda x: x.permute(0, 2, 3, 1)), lz(nn.Linear, 4, 3), lz(nn.GELU)),
        "slice": seq1d(relu, lz(Fn, lambda x: x[:, 1:3, 2:-3:2]), lz(nn.Conv1d, 2, 3, 2), relu),
        "chomp": seq1d(relu, lz(nn.Conv1d, 4, 4, 3, padding=4, dilation=2), lz(Fn, lambda x: x[..., :-4]), relu),
        "select": seq1d(relu, lz(Fn, lambda x: x[:, :, -1])),
        "flip_roll": seq1d(relu, lz(Fn, lambda x: x.flip(2).roll(3, 2)), lz(nn.Conv1d, 4, 3, 3), relu),
        "split": seq1d(relu, lz(Fn, lambda x: torch.cat([p * k for k, p in enumerate(x.split(3, 2), 1)], 2)), relu),
        "chunk_gate": seq1d(lz(nn.Conv1d, 4, 6, 3), lz(Fn, lambda x: F.glu(x, 1)), lz(nn.Conv1d, 3, 3, 3)),
        "stack": seq1d(relu, lz(Fn, lambda x: torch.stack([x, x * 2, torch.tanh(x)], 1)), lz(nn.Conv2d, 3, 2, 3)),
        "cat_channels": seq1d(
            lz(Fn, lambda x: torch.cat([x, F.max_pool1d(x, 3, 1, 1)], 1)), lz(nn.BatchNorm1d, 8), relu
        ),
        "cat_twice": seq1d(relu, lz(Fn, lambda x: torch.cat([x, x], 2)), lz(nn.Conv1d, 4, 3, 5), relu),
        "pad_constant": seq1d(relu, lz(nn.ConstantPad1d, (2, 1), 0.0), lz(nn.Conv1d, 4, 3, 4), relu),
        "pad_reflect": seq1d(relu, lz(nn.ReflectionPad1d, (3, 2)), lz(nn.Conv1d, 4, 3, 4), relu),
        "pad_replicate_2d": seq2d(relu, lz(nn.ReplicationPad2d, (3, 2, 1, 0)), lz(nn.Conv2d, 4, 3, 4), relu),
        "repeat": seq1d(relu, lz(Fn, lambda x: x.repeat(1, 2, 1).repeat_interleave(2, 2)), lz(nn.Conv1d, 8, 3, 3)),
        "upsample_nearest": seq1d(relu, lz(nn.Upsample, scale_factor=3), lz(nn.Conv1d, 4, 3, 3), relu),
        "upsample_linear": seq1d(relu, lz(nn.Upsample, scale_factor=2.5, mode="linear"), lz(nn.Conv1d, 4, 3, 3)),
        "upsample_bilinear": seq2d(relu, lz(nn.Upsample, size=(13, 7), mode="bilinear", align_corners=True)),
        "conv_transpose1d": seq1d(relu, lz(nn.ConvTranspose1d, 4, 3, 4, stride=3, padding=1, output_padding=2), relu),
        "conv_transpose_groups": seq1d(relu, lz(nn.ConvTranspose1d, 4, 6, 3, groups=2, dilation=2, bias=False), relu),
        "conv_transpose2d": seq2d(relu, lz(nn.ConvTranspose2d, 4, 3, (2, 3), stride=2), relu),
        "depthwise_wide": seq2d(relu, lz(nn.Conv2d, 4, 12, (3, 2), groups=4, stride=(1, 2), padding=1), relu),
        "copy_function_halo": seq2d(
            lz(Fn, lambda x: x.flip(2)), lz(nn.LeakyReLU, 0.2), lz(nn.Conv2d, 4, 3, 3, padding=1), relu
        ),
        # several values
        "gate_channel": seq1d(relu, lz(Fn, lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True))), lz(nn.Tanh)),
        "gate_space": seq2d(relu, lz(Fn, lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))), lz(nn.Tanh)),
        "divide": seq1d(lz(Fn, lambda x: x / (1 + x.square().sum(1, keepdim=True))), lz(nn.Tanh)),
        "broadcast_add": seq1d(relu, lz(Fn, lambda x: x - x.mean(2, keepdim=True)), lz(nn.Tanh)),
        "matmul": seq1d(lz(Fn, lambda x: x @ x.transpose(1, 2)), lz(nn.Tanh)),
        # reductions
        "mean_over_channels": seq2d(relu, lz(Fn, lambda x: x.mean(1))),
        "sum_two": seq2d(relu, lz(Fn, lambda x: x.sum((1, 3)))),
        "amax": seq1d(lz(Fn, lambda x: x.amax(2))),
        "max_dim": seq1d(lz(Fn, lambda x: x.max(1).values)),
        # norms
        "layer_norm": seq1d(lz(nn.LayerNorm, 16), relu, lz(nn.LayerNorm, (4, 16)), relu),
        "layer_norm_plain": seq1d(lz(nn.LayerNorm, 16, elementwise_affine=False), relu),
        "group_norm": seq1d(lz(nn.GroupNorm, 2, 4), relu, lz(nn.GroupNorm, 4, 4, affine=False), relu),
        "instance_norm": seq2d(lz(nn.InstanceNorm2d, 4, affine=True), relu, lz(nn.InstanceNorm2d, 4), relu),
        "softmax_space": seq1d(lz(nn.Softmax, 2), lz(nn.Conv1d, 4, 3, 3)),
        "log_softmax_channels": seq2d(lz(nn.LogSoftmax, 1), lz(nn.Conv2d, 4, 3, 3)),
        # batch norm, dropout, heads
        "bn_after_conv": seq1d(lz(nn.BatchNorm1d, 4), relu, lz(nn.Conv1d, 4, 5, 3), lz(nn.BatchNorm1d, 5), relu),
        "bn_before_conv": seq1d(relu, lz(nn.BatchNorm1d, 4), lz(nn.Conv1d, 4, 5, 3, padding=1), relu),
        "bn_after_pool": seq1d(relu, lz(nn.MaxPool1d, 2), lz(nn.BatchNorm1d, 4), lz(nn.ELU)),
        "bn_not_affine": seq2d(lz(nn.BatchNorm2d, 4, affine=False), relu),
        "dropout": seq1d(lz(nn.Dropout, 0.5), relu, lz(nn.Dropout1d, 0.3), lz(nn.Identity), lz(nn.AlphaDropout, 0.1)),
    }  # fmt: skip
    return [Case(name, make, (shape,)) for name, (make, shape) in recipes.items()]


def _whole() -> list[Case]:
    chain, relu = nn.Sequential, nn.ReLU
    no_statistics = partial(nn.BatchNorm1d, track_running_stats=False)
    return [
        Case("linear_only", lambda: nn.Linear(7, 3), ((7,),)),
        Case("linear_nobias", lambda: chain(nn.Linear(7, 5, bias=False), relu(), nn.Linear(5, 1)), ((7,),)),
        Case("decoder", decoder, ((4,),)),
        Case("emulator", emulator, ((3,),)),
        Case("linear_axes", lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), ((3, 4),)),
        Case("bn_linear", lambda: chain(nn.Linear(7, 6), nn.BatchNorm1d(6), relu(), nn.Linear(6, 3)), ((7,),)),
        Case("bn_first", lambda: chain(nn.BatchNorm1d(7), nn.Linear(7, 6), nn.ELU(), nn.Linear(6, 3)), ((7,),)),
        Case("softmax", lambda: chain(nn.Linear(7, 6), relu(), nn.Linear(6, 4), nn.Softmax(1)), ((7,),)),
        Case("log_softmax", lambda: chain(nn.Linear(7, 6), relu(), nn.Linear(6, 4), nn.LogSoftmax(-1)), ((7,),)),
        Case("softmax_axis", lambda: chain(nn.Conv1d(2, 4, 3), nn.Softmax(1)), ((2, 6),)),
        Case("scalar_output", lambda: chain(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)), ((7,),)),
        Case("conv_output", lambda: chain(nn.Conv2d(1, 2, 2), relu(), nn.Conv2d(2, 2, 2)), ((1, 4, 5),)),
        Case("identity", nn.Identity, ((4,),)),
        Case("residual", lambda: Residual1d(nn.Identity()), ((1, 20),)),
        Case("skips_all", SkipsAll, ((6,),)),
        Case("shared_conv", SharedConv, ((3, 12),)),
        Case("two_inputs", TwoInputs, ((1, 10), (3,))),
        Case("weight_norm", weight_normed, ((2, 12),)),
        Case("per_step", PerStep, ((2, 8),)),
        Case("lstm", LstmNet, ((7, 2),), opaque=True),
        Case("resnet1d_opaque", lambda: Residual1d(RunningLogMean()), ((1, 20),), opaque=True),
        Case("attention", Attention, ((5, 4),)),
        Case("heads_in_front", HeadsInFront, ((5, 4),)),
        Case("heads_as_batches", HeadsAsBatches, ((5, 4),)),
        Case("sequence_first", SequenceFirst, ((5, 4),)),
        Case("sequence_first_last", lambda: SequenceFirst(last=True), ((5, 4),)),
        Case("lstm_sequence_first", LstmSequenceFirst, ((7, 2),), opaque=True),
        Case("attends_to_samples", AttendsToSamples, ((5, 4),), traceable=False),
        Case("squeeze_excite", SqueezeExcite, ((2, 8),)),
        Case("resnet1d_custom", lambda: Residual1d(CustomBackward()), ((1, 20),), traceable=False),
        Case("mixes_samples", MixesSamples, ((4,),), traceable=False),
        Case("bn_no_statistics", lambda: chain(nn.Linear(4, 5), no_statistics(5)), ((4,),), traceable=False),
        Case("freezes_one", FreezesOne, ((4,),), traceable=False),
        Case("value_branch", ValueBranch, ((4,),), traceable=False),
    ]  # fmt: skip


_BENCH = [
    Case("cnn1d", cnn1d, ((1, 224),), bench=True),
    Case("cnn1d_strided", cnn1d_strided, ((1, 224),), bench=True),
    Case("lenet5", LeNet5, ((1, 28, 28),), bench=True),
    Case("mlp", mlp, ((224,),), bench=True),
    Case("fcn", fcn, ((1, 224),), bench=True),
]

CASES: dict[str, Case] = {case.name: case for case in [*_BENCH, *_small(), *_whole()]}
BENCH: tuple[Case, ...] = tuple(c for c in CASES.values() if c.bench)
SMALL: tuple[Case, ...] = tuple(c for c in CASES.values() if not c.bench)
TRACEABLE: tuple[Case, ...] = tuple(c for c in CASES.values() if c.traceable)


def net(
    name: str = "relu_inplace", n: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A case's network and samples."""
    case = CASES[name]
    return case.build(dtype=dtype), case.inputs(n, dtype=dtype)
