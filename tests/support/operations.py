"""Functional calls as networks contain them, one row each: those that have a form, and those that torch runs.

A row is the per-sample shape of a value ``h [N, *shape]``, and a function of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkern.ir.program import Shape

Operation = tuple[Shape, Callable[[Tensor], Tensor | list[Tensor]]]
S: Shape = (6, 8)
I: Shape = (4, 6, 8)  # noqa: E741
Q: Shape = (2, 3, 4, 5)


def R(*shape: int) -> Tensor:
    """A constant of the code."""
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) * 1.7).reshape(shape)


def assign(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y = h.clone()
    change(y)
    return y


def first(h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f`` on ``[6, N, 8]``."""
    return f(h.transpose(0, 1)).transpose(0, 1)


def sequence_first(h: Tensor) -> Tensor:
    y = h.transpose(0, 1)
    for _ in range(60):
        y = F.gelu(y) + y.roll(1, 0) * 0.3
    return y.transpose(0, 1)


def heads(h: Tensor) -> Tensor:
    """Queries, keys and values ``[3, N, heads, tokens, width]``."""
    return F.linear(h, R(24, 8)).view(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)


def attended(q: Sequence[Tensor] | Tensor) -> Tensor:
    return (q[0] @ q[1].transpose(-1, -2)).softmax(-1) @ q[2]


def cross_covariance(q: Sequence[Tensor]) -> Tensor:
    """XCiT's attention between channels."""
    scores = F.normalize(q[0], dim=-1) @ F.normalize(q[1], dim=-1).transpose(-2, -1) * R(2, 1, 1)
    return scores.softmax(-1) @ q[2]


#: Operations by family of which no step is left to torch.
FORMS: dict[str, dict[str, Operation]] = {
    "einsum": {
        "einsum_const": (S, lambda h: torch.einsum("nij,oj->nio", h, R(5, 8))),
        "einsum_const_mid": (I, lambda h: torch.einsum("ncij,oi->ncoj", h, R(5, 6))),
        "einsum_const_two": (I, lambda h: torch.einsum("ncij,ocij->no", h, R(3, 4, 6, 8))),
        "einsum_const_batch": (S, lambda h: torch.einsum("nij,ijk->nik", h, R(6, 8, 3))),
        "einsum_bilinear": (S, lambda h: torch.einsum("nij,nkj->nik", h, h.tanh())),
        "einsum_heads": (I, lambda h: torch.einsum("nhqd,nhkd->nhqk", h, h.tanh())),
        "einsum_heads_mid": (I, lambda h: torch.einsum("nqhd,nkhd->nhqk", h, h.tanh())),
        "einsum_av": (I, lambda h: torch.einsum("nhqk,nkhd->nqhd", h.softmax(-1), h.permute(0, 3, 1, 2).tanh())),
        "einsum_sum": (S, lambda h: torch.einsum("nij->ni", h)),
        "einsum_transpose": (S, lambda h: torch.einsum("nij->nji", h)),
        "einsum_outer": ((5,), lambda h: torch.einsum("ni,nj->nij", h, h.tanh())),
        "einsum_dot": (S, lambda h: torch.einsum("nij,nij->n", h, h.tanh()).unsqueeze(1)),
        "einsum_dots": (I, lambda h: torch.einsum("b...ij,b...kj->b...ik", h, h.tanh())),
        "einsum_mul": (S, lambda h: torch.einsum("nij,nj->nij", h, h[:, 0].tanh())),
        "einsum_token": (
            S,
            lambda h: torch.einsum("bid,bjd->bij", (R(1, 6, 8).expand(h.shape[0], -1, -1) @ R(8, 8)), h),
        ),
        "einsum_two_const": (S, lambda h: torch.einsum("nij,ik,jl->nkl", h, R(6, 3), R(8, 2))),
    },
    "names": {  # other names of ops, and conversions and caches that change nothing
        "aliases": (S, lambda h: torch.multiply(h, 2).subtract(h.negative()).divide(3).absolute().clip(-1, 1).arctan()),
        "aliases_special": (
            S,
            lambda h: torch.special.expit(torch.concat([h, torch.special.erf(h)], 1)).moveaxis(1, 2),
        ),
        "cat_empty": (I, lambda h: torch.cat([torch.tensor([], dtype=h.dtype), h, h.tanh()], dim=-2)),
        "type_as": (S, lambda h: h.type_as(R(1).to(h)).to("cpu").to(h.tanh())),
    },
    "matmul": {
        "matmul_const_left": (S, lambda h: R(6, 8).T @ h),
        "matmul_const_left2": ((8,), lambda h: (R(6, 8) @ h.unsqueeze(-1)).squeeze(-1)),
        "matmul_const_batched": (I, lambda h: h @ R(4, 8, 3)),
        "matmul_const_left_batched": (I, lambda h: R(4, 3, 6) @ h),
        "matmul_const_vec": (S, lambda h: h @ R(8)),
        "matmul_broadcast": (I, lambda h: h @ h[:, :1].mT),
        "matmul_vec_value": (S, lambda h: h @ h[:, 0].unsqueeze(-1)),
        "matmul_4d": (I, lambda h: h @ h.transpose(-1, -2)),
        "bmm_const": (S, lambda h: torch.bmm(h, R(5, 8).T.expand(h.shape[0], -1, -1))),
        "addmm_view": (S, lambda h: torch.addmm(R(4, 4)[0, :3], h.view(-1, 8), R(8, 3)).view(h.shape[0], 6, 3)),
        "baddbmm": (S, lambda h: torch.baddbmm(h @ h.mT, h, h.tanh().mT)),
        "bilinear": ((6,), lambda h: F.bilinear(h, h.tanh(), R(3, 6, 6))),
        "kron_outer": ((5,), lambda h: h.unsqueeze(2) * h.unsqueeze(1)),
    },
    "fourier": {
        "rfft_abs": (S, lambda h: torch.fft.rfft(h).abs()),
        "rfft_real_imag": (S, lambda h: torch.cat([torch.fft.rfft(h).real, torch.fft.rfft(h).imag], -1)),
        "rfft_view": (S, lambda h: torch.view_as_real(torch.fft.rfft(h, norm="ortho"))),
        "rfft_filter_irfft": (S, lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.complex(R(5), R(5)), n=8)),
        "rfft_real_filter": (S, lambda h: torch.fft.irfft(torch.fft.rfft(h, n=16) * R(9), n=16)[..., :8]),
        "rfft_power": (S, lambda h: torch.fft.rfft(h, dim=1).abs().pow(2)),
        "rfft_log": (S, lambda h: torch.log1p(torch.fft.rfft(h).abs())),
        "fft_real": (S, lambda h: torch.fft.fft(h).real),
        "fft2_real": (S, lambda h: torch.fft.fft2(h).real),
        "fft_fft_real": (S, lambda h: torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real),
        "ifft": (S, lambda h: torch.fft.ifft(torch.fft.fft(h) * torch.fft.fft(R(8))).real),
        "rfft2": (S, lambda h: torch.fft.irfft2(torch.fft.rfft2(h) * torch.complex(R(6, 5), R(6, 5)), s=(6, 8))),
        "stft_abs": (
            (32,),
            lambda h: torch.stft(h, 8, 4, window=torch.hann_window(8, dtype=torch.float64), return_complex=True).abs(),
        ),
        "stft_nocenter": (
            (32,),
            lambda h: torch.stft(h, 8, 4, center=False, return_complex=True, normalized=True).abs(),
        ),
        "stft_channels": (
            (3, 32),
            lambda h: (
                torch.stft(
                    h.reshape(-1, 32),
                    8,
                    4,
                    window=torch.hann_window(8, dtype=torch.float64),
                    return_complex=True,
                    center=False,
                )
                .abs()
                .view(h.shape[0], 3, 5, 7)
            ),
        ),
        "stft_channels_center": (
            (3, 32),
            lambda h: torch.stft(h.reshape(-1, 32), 8, 4, return_complex=True).abs().view(h.shape[0], 3, 5, 9),
        ),
        "complex_mul": (S, lambda h: (torch.complex(h, h.tanh()) * torch.complex(h.sin(), h)).abs()),
        "view_as_complex": (
            (6, 4, 2),
            lambda h: torch.view_as_real(torch.view_as_complex(h.contiguous()) * torch.view_as_complex(R(4, 2))),
        ),
        "complex_conj": (S, lambda h: (torch.fft.rfft(h) * torch.fft.rfft(h.tanh()).conj()).real),
        "fft_cat_sum": (S, lambda h: torch.cat([torch.fft.rfft(h), torch.fft.rfft(h.tanh())], 1).sum(1).abs()),
        "hilbert_fft": (
            S,
            lambda h: torch.fft.ifft(
                torch.fft.fft(h) * torch.tensor([1, 2, 2, 2, 1, 0, 0, 0.0], dtype=torch.float64)
            ).abs(),
        ),
    },
    "3_d": {
        "conv3d": ((2, 4, 5, 6), lambda h: F.conv3d(h, R(3, 2, 3, 2, 3), R(3), padding=1)),
        "conv3d_depth1": ((1, 4, 5, 6), lambda h: F.conv3d(h, R(3, 1, 4, 1, 1))),
        "conv_transpose3d": ((2, 3, 3, 3), lambda h: F.conv_transpose3d(h, R(2, 3, 2, 2, 2), stride=2)),
        "max_pool3d": ((2, 4, 6, 6), lambda h: F.max_pool3d(h, 2)),
        "avg_pool3d": ((2, 4, 6, 6), lambda h: F.avg_pool3d(h, (2, 3, 2), padding=(1, 1, 0))),
        "adaptive_avg_pool3d": ((2, 4, 6, 6), lambda h: F.adaptive_avg_pool3d(h, (2, 1, 3))),
        "batch_norm3d": ((2, 3, 4, 2), lambda h: F.batch_norm(h, R(2), R(2).abs(), R(2), R(2))),
    },
    "pools": {
        "adaptive_max_pool1d": (S, lambda h: F.adaptive_max_pool1d(h, 1)),
        "adaptive_max_pool1d_k": (S, lambda h: F.adaptive_max_pool1d(h, 4)),
        "adaptive_max_pool1d_uneven": (S, lambda h: F.adaptive_max_pool1d(h, 3)),
        "adaptive_max_pool2d": (I, lambda h: F.adaptive_max_pool2d(h, (3, 2))),
        "adaptive_max_pool2d_1": (I, lambda h: F.adaptive_max_pool2d(h, 1)),
        "adaptive_max_pool2d_uneven": (I, lambda h: F.adaptive_max_pool2d(h, (4, 3))),
        "max_all_dims": (I, lambda h: h.amax((2, 3))),
        "max_pool2d_3d_input": (S, lambda h: F.max_pool2d(h, 2)),
        "fold_pool_rows": (I, lambda h: F.avg_pool1d(h.flatten(0, 1), 2).view(h.shape[0], 4, 6, 4)),
    },
    "assignment": {
        "assign_col": (S, lambda h: assign(h, lambda y: y.__setitem__((slice(None), 0), h[:, 1]))),
        "assign_const": (S, lambda h: assign(h, lambda y: y.__setitem__((slice(None), 0), 1.0))),
        "assign_zero": (S, lambda h: assign(h, lambda y: y.__setitem__((slice(None), slice(None), slice(2, 4)), 0.0))),
        "assign_tensor": (S, lambda h: assign(h, lambda y: y.__setitem__((slice(None), 0), R(8)))),
        "assign_into_zeros": (
            S,
            lambda h: assign(torch.zeros_like(h), lambda y: y.__setitem__((slice(None), slice(1, 3)), h[:, :2])),
        ),
        "assign_new_zeros": (
            S,
            lambda h: assign(h.new_zeros(h.shape[0], 9, 8), lambda y: y.__setitem__((slice(None), slice(1, 7)), h)),
        ),
        "assign_list": (S, lambda h: assign(h, lambda y: y.__setitem__((slice(None), [0, 3]), h[:, 1:3]))),
        "slice_scatter": (S, lambda h: torch.slice_scatter(h, h[:, 1:3].tanh(), 1, 2, 4)),
        "select_scatter": (S, lambda h: torch.select_scatter(h, h[:, 1].tanh(), 1, 2)),
        "index_copy": (S, lambda h: h.index_copy(1, torch.tensor([0, 3]), h[:, 1:3].tanh())),
        "index_add": (S, lambda h: h.index_add(1, torch.tensor([0, 3]), h[:, 1:3].tanh())),
        "scatter_const": (S, lambda h: h.scatter(2, torch.tensor([[[1]]]).expand(h.shape[0], 6, 1), 0.5)),
    },
    "expand_and_repeats": {
        "expand": ((1, 8), lambda h: h.expand(-1, 6, -1)),
        "expand_as": ((1, 8), lambda h: h.expand_as(R(6, 8).expand(h.shape[0], 6, 8))),
        "broadcast_to": ((1, 8), lambda h: h.broadcast_to(h.shape[0], 6, 8)),
        "tile": (S, lambda h: h.tile(1, 2, 1)),
        "tile_last": (S, lambda h: h.tile(3)),
        "repeat_new": ((8,), lambda h: h.unsqueeze(1).repeat(1, 3, 1)),
        "repeat_interleave": (S, lambda h: h.repeat_interleave(2, dim=1)),
        "meshgrid": ((4,), lambda h: h[:, :, None].expand(-1, -1, 3)),
    },
    "arithmetic": {
        "addcmul": (S, lambda h: torch.addcmul(h, h.tanh(), h.sin(), value=0.5)),
        "addcmul_const": (S, lambda h: torch.addcmul(R(8), h, R(8).exp())),
        "addcdiv": (S, lambda h: torch.addcdiv(h, h.tanh(), 2 + h.sin(), value=0.5)),
        "lerp": (S, lambda h: torch.lerp(h, h.tanh(), 0.3)),
        "lerp_t": (S, lambda h: torch.lerp(h, h.tanh(), h.sigmoid())),
        "minimum": (S, lambda h: torch.minimum(h, h.tanh())),
        "maximum": (S, lambda h: torch.maximum(h, h.flip(1))),
        "maximum_const": (S, lambda h: torch.maximum(h, R(8))),
        "clamp_tensor": (S, lambda h: torch.clamp(h, min=R(8) - 1, max=R(8) + 1)),
        "clamp_min_t": (S, lambda h: torch.clamp(h, min=R(8))),
        "remainder": (S, lambda h: torch.remainder(h, 0.3)),
        "pow_scalar_base": (S, lambda h: 2.0**h),
        "pow_half": (S, lambda h: h.abs().pow(0.5)),
        "div_const_num": (S, lambda h: 2.0 / (3 + h.tanh())),
        "div_values": (S, lambda h: h / (3 + h.tanh())),
        "div_param_value": (S, lambda h: R(8) / (3 + h.tanh())),
        "sub_const": (S, lambda h: R(6, 8) - h),
        "floor_mul": (S, lambda h: h.floor() + h),
        "sign": (S, lambda h: h.sign() * h),
        "atan": (S, lambda h: h.atan()),
        "tan": (S, lambda h: (h * 0.1).tan()),
        "sinh_cosh": (S, lambda h: h.sinh() + h.cosh()),
        "asinh": (S, lambda h: h.asinh()),
        "logit": (S, lambda h: h.sigmoid().logit()),
        "erf": (S, lambda h: h.erf()),
        "erfc": (S, lambda h: h.erfc()),
        "log2": (S, lambda h: (h.abs() + 1).log2()),
        "log10": (S, lambda h: (h.abs() + 1).log10()),
        "exp2": (S, lambda h: h.exp2()),
        "gelu_tanh": (S, lambda h: F.gelu(h, approximate="tanh")),
        "mish": (S, lambda h: F.mish(h)),
        "softplus": (S, lambda h: F.softplus(h, 2.0, 5.0)),
        "softsign": (S, lambda h: F.softsign(h)),
        "softshrink": (S, lambda h: F.softshrink(h)),
        "hardshrink": (S, lambda h: F.hardshrink(h)),
        "tanhshrink": (S, lambda h: F.tanhshrink(h)),
        "threshold": (S, lambda h: F.threshold(h, 0.1, 2.0)),
        "rrelu": (S, lambda h: F.rrelu(h)),
        "prelu_axes": (I, lambda h: F.prelu(h, R(4))),
        "prelu_vec": ((6,), lambda h: F.prelu(h, R(6))),
        "prelu_4d": (Q, lambda h: F.prelu(h, R(2))),
        "logsigmoid": (S, lambda h: F.logsigmoid(h)),
        "glu": (S, lambda h: F.glu(h, 1)),
    },
    "norms_and_reductions": {
        "vector_norm": (S, lambda h: torch.linalg.vector_norm(h, dim=-1)),
        "norm": (S, lambda h: h.norm(dim=1, keepdim=True)),
        "norm_1": (S, lambda h: h.norm(p=1, dim=1)),
        "norm_all": (S, lambda h: torch.linalg.vector_norm(h, dim=(1, 2))),
        "norm_inf": (S, lambda h: torch.linalg.vector_norm(h, float("inf"), dim=-1)),
        "normalize": (S, lambda h: F.normalize(h, dim=-1)),
        "normalize_ch": (I, lambda h: F.normalize(h, dim=1)),
        "cosine_similarity": (S, lambda h: F.cosine_similarity(h, h.roll(1, 1), dim=-1)),
        "pairwise_distance": (S, lambda h: F.pairwise_distance(h, h.roll(1, 1))),
        "var": (S, lambda h: h.var(-1)),
        "var_unb": (S, lambda h: h.var(1, unbiased=False, keepdim=True)),
        "var_two": (I, lambda h: h.var((2, 3))),
        "std": (S, lambda h: h.std(-1)),
        "std_two": (I, lambda h: h.std((1, 3), correction=0)),
        "var_mean": (S, lambda h: torch.cat(torch.var_mean(h, -1), 1)),
        "std_mean": (S, lambda h: torch.cat(torch.std_mean(h, 1), 1)),
        "logsumexp": (S, lambda h: h.logsumexp(-1)),
        "logsumexp_two": (S, lambda h: h.logsumexp((1, 2))),
        "max_dim": (S, lambda h: h.max(-1).values),
        "min_dim": (S, lambda h: h.min(-1).values),
        "amin": (S, lambda h: h.amin(-1)),
        "aminmax": (S, lambda h: h.amax(-1) - h.amin(-1)),
        "prod": (S, lambda h: h.prod(-1)),
        "sum_all": (S, lambda h: h.sum((1, 2))),
        "mean_4": (Q, lambda h: h.mean((2, 4))),
        "cumsum": (S, lambda h: h.cumsum(-1)),
        "cumsum1": (S, lambda h: h.cumsum(1)),
        "diff": (S, lambda h: h.diff(dim=-1)),
        "layer_norm2": (I, lambda h: F.layer_norm(h, (6, 8), R(6, 8), R(6, 8))),
        "layer_norm_ch": (I, lambda h: F.layer_norm(h.permute(0, 2, 3, 1), (4,), R(4), R(4)).permute(0, 3, 1, 2)),
        "rms_norm": (S, lambda h: F.rms_norm(h, (8,), R(8))),
        "rms_norm_hand": (S, lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * R(8)),
        "group_norm": (S, lambda h: F.group_norm(h, 3, R(6), R(6))),
        "group_norm_4": ((4, 2, 3, 4), lambda h: F.group_norm(h, 2, R(4), R(4))),
        "instance_norm": (I, lambda h: F.instance_norm(h, weight=R(4), bias=R(4))),
        "local_response": (I, lambda h: F.local_response_norm(h, 3)),
        "softmin": (S, lambda h: F.softmin(h, 1)),
        "softmax_4": (Q, lambda h: h.softmax(2)),
    },
    "selection": {
        "unbind": (I, lambda h: list(h.unbind(1))),
        "unbind_5": (Q, lambda h: list(h.unbind(2))),
        "select_5": (Q, lambda h: h[:, :, 1]),
        "split": (Q, lambda h: list(h.split(2, 3))),
        "chunk": (S, lambda h: list(h.chunk(3, 1))),
        "tensor_split": (S, lambda h: list(h.tensor_split(4, 1))),
        "index_arange": (S, lambda h: h[:, torch.arange(6).flip(0)]),
        "index_list": (S, lambda h: h[:, :, [0, 2, 5]]),
        "index_two": (S, lambda h: h[:, [0, 1, 2], [3, 4, 5]]),
        "index_two_grid": (S, lambda h: h[:, torch.tensor([[0], [1]]), torch.tensor([3, 4, 5])]),
        "index_triu": ((5, 5), lambda h: h[:, torch.triu_indices(5, 5)[0], torch.triu_indices(5, 5)[1]]),
        "index_select": (S, lambda h: h.index_select(1, torch.tensor([4, 0, 0]))),
        "gather_const": (S, lambda h: h.gather(2, torch.tensor([0, 3]).expand(h.shape[0], 6, 2))),
        "diagonal": ((5, 5), lambda h: h.diagonal(dim1=1, dim2=2)),
        "diag_embed": ((5,), lambda h: torch.diag_embed(h)),
        "trace": ((5, 5), lambda h: h.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)),
        "tril": ((5, 5), lambda h: h.tril()),
        "triu": ((5, 5), lambda h: h.triu(1)),
        "flip": (S, lambda h: h.flip(1, 2)),
        "roll": (S, lambda h: h.roll((1, 2), (1, 2))),
        "rot90": ((4, 4), lambda h: torch.rot90(h, 1, (1, 2))),
        "movedim": (I, lambda h: h.movedim(1, 3)),
        "swapaxes": (I, lambda h: h.swapaxes(1, 3)),
        "masked_fill": (S, lambda h: h.masked_fill((R(8) > 0), 0.0)),
        "masked_fill_1": (S, lambda h: h.masked_fill((R(8) > 0), 1.5)),
        "masked_fill_inf": (S, lambda h: h.masked_fill((R(8) > 0), float("-inf")).softmax(-1)),
        "masked_fill_pad": (S, lambda h: torch.where((R(8) > 0), h, 0.0)),
        "where_const": (S, lambda h: torch.where((R(8) > 0), h, h.tanh())),
        "as_strided": (S, lambda h: h.unfold(2, 4, 2)),
        "unfold1": (S, lambda h: h.unfold(1, 3, 1).mean(-1)),
        "im2col": (I, lambda h: F.unfold(h, (3, 2), padding=1, stride=(2, 1))),
        "fold": ((8, 12), lambda h: F.fold(h, (4, 5), 2)),
        "fold_strided": ((8, 4), lambda h: F.fold(h, (4, 4), 2, stride=2)),
        "pixel_shuffle": (I, lambda h: F.pixel_shuffle(h, 2)),
        "pixel_unshuffle": (I, lambda h: F.pixel_unshuffle(h, 2)),
        "channel_shuffle": (I, lambda h: F.channel_shuffle(h, 2)),
        "pad_value": (S, lambda h: F.pad(h, (1, 2), value=1.5)),
        "pad_reflect2": (I, lambda h: F.pad(h, (1, 2, 1, 0), mode="reflect")),
        "pad_circular": (S, lambda h: F.pad(h, (1, 2), mode="circular")),
        "pad_batch_zero": (S, lambda h: F.pad(h, (1, 1, 0, 2, 0, 0))),
        "pad_neg": (S, lambda h: F.pad(h, (-1, -2))),
        "cat_const": (S, lambda h: torch.cat([h, torch.ones(h.shape[0], 2, 8, dtype=torch.float64)], 1)),
        "cat_const_expand": (S, lambda h: torch.cat([R(1, 1, 8).expand(h.shape[0], -1, -1), h], 1)),
        "cat_const_two": (S, lambda h: torch.cat([h, R(6, 8).unsqueeze(0).repeat(h.shape[0], 1, 1), h], 1)),
        "add_ones": (S, lambda h: h + torch.ones(h.shape[0], 6, 8, dtype=torch.float64)),
        "add_ones_like": (S, lambda h: h + torch.ones_like(h)),
        "mul_full": (S, lambda h: h * torch.full((h.shape[0], 6, 1), 0.5, dtype=torch.float64)),
        "new_zeros_cat": (S, lambda h: torch.cat([h.new_zeros(h.shape[0], 1, 8), h], 1)),
        "add_arange": (S, lambda h: h + torch.arange(8, dtype=torch.float64).expand(h.shape[0], 6, 8)),
        "mask_n": (S, lambda h: h.masked_fill(torch.zeros(h.shape[0], 6, 8, dtype=torch.bool), 0.0)),
        "pos_embedding": (S, lambda h: h + F.embedding(torch.arange(6).unsqueeze(0).expand(h.shape[0], -1), R(10, 8))),
        "stack_const": (S, lambda h: torch.stack([h, torch.zeros_like(h)], 1)),
    },
    "interpolation": {
        "interp_nearest": (I, lambda h: F.interpolate(h, scale_factor=2)),
        "interp_nearest_exact": (I, lambda h: F.interpolate(h, size=(5, 11), mode="nearest-exact")),
        "interp_nearest3d": ((2, 2, 3, 4), lambda h: F.interpolate(h, scale_factor=2)),
        "interp_bilinear": (I, lambda h: F.interpolate(h, size=(9, 5), mode="bilinear")),
        "interp_bilinear_aa": (I, lambda h: F.interpolate(h, size=(3, 5), mode="bilinear", antialias=True)),
        "interp_bicubic": (I, lambda h: F.interpolate(h, size=(9, 5), mode="bicubic")),
        "interp_bicubic_ac": (I, lambda h: F.interpolate(h, size=(9, 5), mode="bicubic", align_corners=True)),
        "interp_bicubic_aa": (I, lambda h: F.interpolate(h, size=(3, 5), mode="bicubic", antialias=True)),
        "interp_linear": (S, lambda h: F.interpolate(h, size=13, mode="linear", align_corners=True)),
        "interp_trilinear": ((2, 2, 3, 4), lambda h: F.interpolate(h, size=(3, 4, 5), mode="trilinear")),
        "interp_area": (I, lambda h: F.interpolate(h, size=(3, 4), mode="area")),
    },
    "attention": {
        "sdpa_mask": (
            I,
            lambda h: F.scaled_dot_product_attention(
                h, h.tanh(), h.sin(), attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()
            ),
        ),
        "sdpa_3d": (S, lambda h: F.scaled_dot_product_attention(h, h.tanh(), h.sin())),
        "sdpa_causal": (I, lambda h: F.scaled_dot_product_attention(h, h.tanh(), h.sin(), is_causal=True)),
        "sdpa_bias_value": (I, lambda h: F.scaled_dot_product_attention(h, h.tanh(), h.sin(), attn_mask=h[..., :6])),
        "sdpa_gqa": (I, lambda h: F.scaled_dot_product_attention(h, h[:, :2].tanh(), h[:, 2:].sin(), enable_gqa=True)),
        "sdpa_mask_n": (
            I,
            lambda h: F.scaled_dot_product_attention(
                h, h.tanh(), h.sin(), attn_mask=torch.ones(h.shape[0], 1, 6, 6, dtype=torch.float64)
            ),
        ),
        "sdpa_bcast": (I, lambda h: F.scaled_dot_product_attention(h[:, :, :1], h, h.sin())),
    },
    "joined_batch": {
        "joined_conv1d": (S, lambda h: F.conv1d(h.reshape(-1, 1, 8), R(3, 1, 3)).reshape(h.shape[0], -1)),
        "joined_conv2d": (I, lambda h: F.conv2d(h.reshape(-1, 1, 6, 8), R(3, 1, 3, 3)).reshape(h.shape[0], -1)),
        "joined_bn": (S, lambda h: F.batch_norm(h.reshape(-1, 8), R(8), R(8).abs(), R(8), R(8)).view(-1, 6, 8)),
        "joined_bn3": (I, lambda h: F.batch_norm(h.flatten(0, 1), R(6), R(6).abs(), R(6), R(6)).view(-1, 4, 6, 8)),
        "joined_pool": (I, lambda h: F.max_pool1d(h.flatten(0, 1), 2).view(-1, 4, 6, 4)),
        "joined_bn_reshape_as": (
            I,
            lambda h: F.batch_norm(h.flatten(0, 1), R(6), R(6).abs(), R(6), R(6)).reshape_as(h),
        ),
        "joined_mean": (I, lambda h: h.flatten(0, 1).mean(1).view(-1, 4, 8)),
        "joined_sum": (S, lambda h: (h.reshape(-1, 8) * R(8)).sum(-1).view(-1, 6)),
        "joined_gelu_linear": (I, lambda h: F.gelu(F.linear(h.flatten(0, 2), R(5, 8))).view(h.shape[0], 4, 6, 5)),
        "joined_group_norm": (I, lambda h: F.group_norm(h.flatten(0, 1), 3, R(6), R(6)).view(-1, 4, 6, 8)),
        "joined_conv_gelu_pool": (
            S,
            lambda h: F.avg_pool1d(F.gelu(F.conv1d(h.reshape(-1, 1, 8), R(3, 1, 3))), 2).reshape(h.shape[0], -1),
        ),
        "batch_last_linear": (S, lambda h: F.linear(h.permute(1, 2, 0).permute(0, 2, 1), R(3, 8)).transpose(0, 1)),
        "conv_transposed_batch": (S, lambda h: F.conv1d(h.transpose(0, 1).transpose(0, 1), R(3, 6, 3))),
        "swin_windows": (
            (4, 4, 3),
            lambda h: (
                h.view(-1, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3).softmax(1).reshape(h.shape[0], -1)
            ),
        ),
        "stack_batch0": (S, lambda h: torch.stack([h, h.tanh()], 0).sum(0)),
        "qkv_heads_first": (S, lambda h: attended(heads(h))),
        "qkv_unbind": (S, lambda h: attended(heads(h).unbind(0))),
        "xcit": (S, lambda h: cross_covariance(heads(h).transpose(-2, -1).unbind(0))),
        "bias_table": (I, lambda h: h + R(5, 4)[torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]] * 6)].permute(2, 0, 1)),
        "mha_seq_first": (S, lambda h: h.transpose(0, 1).softmax(-1).transpose(0, 1)),
        "lstm_like_loop": (S, lambda h: torch.stack([h[:, t].tanh() for t in range(6)], 1)),
        "long_batch_away": (S, lambda h: sequence_first(h)),
        "numpy_T": (S, lambda h: h.permute(2, 1, 0).permute(2, 1, 0)),
    },
}

#: Operations with the samples in axis 1; some of these have a form.
SEQUENCE_FIRST: dict[str, Operation] = {
    "first_cat": (S, lambda h: first(h, lambda y: torch.cat([y, R(1, 1, 8).expand(-1, h.shape[0], -1)]))),
    "first_cat_last": (S, lambda h: first(h, lambda y: torch.cat([R(6, 1, 2).expand(-1, h.shape[0], -1), y], 2))),
    "first_stack": (S, lambda h: first(h, lambda y: torch.stack([y, y.tanh()], 2).flatten(2))),
    "first_stack_zeros": (S, lambda h: first(h, lambda y: torch.stack([y, torch.zeros_like(y)]).sum(0))),
    "first_pad": (S, lambda h: first(h, lambda y: F.pad(y, (1, 2)))),
    "first_norms": (S, lambda h: first(h, lambda y: y.norm(dim=-1, keepdim=True) * y.var(0) + y.logsumexp(0))),
    "first_index": (S, lambda h: first(h, lambda y: y.index_select(0, torch.tensor([0, 3])).cumsum(0))),
    "first_assign": (S, lambda h: first(h, lambda y: assign(y, lambda z: z.__setitem__(0, y[2])))),
    "first_assign_number": (S, lambda h: first(h, lambda y: assign(y, lambda z: z.__setitem__(0, 1.0)))),
    "first_fill": (S, lambda h: first(h, lambda y: y.masked_fill(R(8) > 0, 0.5))),
    "first_where": (S, lambda h: first(h, lambda y: torch.where(R(8) > 0, y, y.addcmul(y, R(6, 1, 8))))),
    "first_maximum": (S, lambda h: first(h, lambda y: torch.maximum(y, R(8)).amin(0).unsqueeze(0))),
}

#: Operations that torch runs and differentiates.
TORCHS: dict[str, Operation] = {
    "einsum_diag": ((5, 5), lambda h: torch.einsum("nii->ni", h)),
    "fmax": (S, lambda h: torch.fmax(h, h.flip(1))),
    "pow_tensor": (S, lambda h: h.abs().add(1).pow(h.tanh())),
    "pow_zero": (S, lambda h: h.pow(0) * h),
    "atan2": (S, lambda h: torch.atan2(h, h.cos())),
    "logaddexp": (S, lambda h: torch.logaddexp(h, h.tanh())),
    "hypot": (S, lambda h: torch.hypot(h, h.cos())),
    "sinc": (S, lambda h: torch.sinc(h)),
    "xlogy": (S, lambda h: torch.xlogy(h, h.abs() + 1)),
    "heaviside_mul": (S, lambda h: h * (h > 0)),
    "nan_to_num": (S, lambda h: h.nan_to_num()),
    "norm_3": (S, lambda h: torch.linalg.vector_norm(h, 3, dim=-1)),
    "cdist": (S, lambda h: torch.cdist(h, h.roll(1, 1) + 1)),
    "median": (S, lambda h: h.median(-1).values),
    "cumprod": (S, lambda h: h.cumprod(-1)),
    "logcumsumexp": (S, lambda h: h.logcumsumexp(-1)),
    "cummax": (S, lambda h: h.cummax(-1).values),
    "sort": (S, lambda h: h.sort(-1).values),
    "topk": (S, lambda h: h.topk(3, -1).values),
    "kthvalue": (S, lambda h: h.kthvalue(2, -1).values),
    "gather_argmax": (S, lambda h: h.gather(2, h.argmax(2, keepdim=True))),
    "where_value": (S, lambda h: torch.where(h > 0, h, h.tanh())),
    "where_scalar": (S, lambda h: torch.where(h > 0.1, h, 0.0)),
    "masked_value": (S, lambda h: h.masked_fill(h < 0, 0.0)),
    "grid_sample": (I, lambda h: F.grid_sample(h, R(1, 3, 3, 2).expand(h.shape[0], -1, -1, -1), align_corners=True)),
}
