"""`tangermeme.deep_lift_shap.deep_lift_shap` and `tangermeme.pisa.pisa` on gradkern's engine.

Change the import; arguments, results and errors stay tangermeme's.

    from gradkern.integrations.tangermeme import deep_lift_shap, pisa

There are two improvements.  The rules also hold for functions (``F.relu``), reused modules and ReLUs before pools,
where tangermeme warns of convergence deltas.  Memory is bounded by gradkern's budget, so ``batch_size`` only says how
many references are drawn at a time.  The caller's own rules (``additional_nonlinear_ops``) and half precision run in
tangermeme itself, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..attr import DeepLift, DeepLiftShap

try:
    from tangermeme import deep_lift_shap as _shap
    from tangermeme import pisa as _pisa
    from tangermeme.ersatz import dinucleotide_shuffle
    from tangermeme.results import AttributionReferencesResult
    from tangermeme.utils import PackedSequence, validate_input
except ImportError as error:
    raise ImportError(
        f"gradkern.integrations.tangermeme needs tangermeme 1.6 or newer ({error}). Install it with: "
        "pip install 'gradkern[genomics]'"
    ) from error

__all__ = ["deep_lift_shap", "pisa"]

EPS = 1e-6  # as in tangermeme: where inputs differ by less, the derivative takes the place of the secant
GROUP = 512  # pairs of a sequence and a reference per call of the engine, which divides them into blocks
RELATIVE = 0.01  # a warning is given for a delta above this share of the change of the output
ROUNDING = 64  # units in the last place of the outputs; a larger delta is not due to their rounding
AGAIN = 4  # pairs per call whose deltas are computed again


def deep_lift_shap(
    model: nn.Module,
    X: Tensor,
    args: tuple[Tensor, ...] | None = None,
    target: int = 0,
    batch_size: int = 32,
    references: Any = dinucleotide_shuffle,
    n_shuffles: int = 20,
    return_references: bool = False,
    hypothetical: bool = False,
    warning_threshold: float = 0.001,
    additional_nonlinear_ops: dict[type, Any] | None = None,
    print_convergence_deltas: bool = False,
    raw_outputs: bool = False,
    only_warn: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    random_state: int | None = None,
    verbose: bool = False,
) -> Any:
    """Attributions ``[N, 4, length]`` of output ``target``, the mean over references; see tangermeme.

    ``raw_outputs``: the multipliers ``[N, n_shuffles, 4, length]`` of every pair.  Raises tangermeme's errors.
    """
    given = dict(locals())
    validate_input(X, "X", shape=(-1, -1, -1), ohe=True, only_warn=only_warn)
    if X.shape[0] == 0:
        raise ValueError("deep_lift_shap requires at least one example; got X with shape[0] == 0.")
    dtype = _dtype(model, dtype)
    reason = _not_ours(additional_nonlinear_ops, dtype)
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return _shap.deep_lift_shap(**given)
    if _is_given(references):
        shape = (X.shape[0], -1, X.shape[1], X.shape[2])
        validate_input(references, "references", shape=shape, ohe=True, allow_N=True, ohe_dim=-2, only_warn=only_warn)
        n_shuffles = references.shape[1]
    _check_counts(n_shuffles, args, X.shape[0])
    batches, used = [], []
    with _at(model, device) as place:
        check_outputs(model, X[:1], args, dtype, place, "deep_lift_shap")
        draws = _references_of(X, references, n_shuffles, batch_size, random_state, dtype)
        for a, b, refs in _progress(draws, X.shape[0], verbose):
            x = _rows(X, a, b, dtype).to(place)
            more = None if args is None else tuple(arg[a:b].to(place).type(dtype) for arg in args)
            call = _Call(model, x, refs.to(place), more, warning_threshold, print_convergence_deltas)
            maps = call.raw(target) if raw_outputs else call.mean(target)
            maps = maps.cpu()
            batches.append(maps if raw_outputs or hypothetical else maps * _rows(X, a, b, dtype).cpu())
            used.append(refs.cpu())
    return _result(batches, used, X, references, return_references)


def pisa(
    model: nn.Module,
    X: Tensor,
    args: tuple[Tensor, ...] | None = None,
    batch_size: int = 32,
    references: Any = dinucleotide_shuffle,
    n_shuffles: int = 20,
    return_references: bool = False,
    hypothetical: bool = False,
    warning_threshold: float = 0.001,
    additional_nonlinear_ops: dict[type, Any] | None = None,
    print_convergence_deltas: bool = False,
    raw_outputs: bool = False,
    device: str | torch.device | None = None,
    random_state: int | None = None,
    verbose: bool = False,
) -> Any:
    """Attributions ``[N, n_outputs, 4, length]`` of every output, the mean over references; see tangermeme.

    ``raw_outputs``: the multipliers ``[N, n_shuffles, n_outputs, 4, length]`` of every pair.  Raises tangermeme's
    errors.
    """
    given = dict(locals())
    validate_input(X, "X", shape=(-1, -1, -1), ohe=True)
    if X.shape[0] == 0:
        raise ValueError("pisa requires at least one example; got X with shape[0] == 0.")
    reason = _not_ours(additional_nonlinear_ops, None)
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return _pisa.pisa(**given)
    if _is_given(references):
        shape = (X.shape[0], -1, X.shape[1], X.shape[2])
        validate_input(references, "references", shape=shape, ohe=True, allow_N=True, ohe_dim=-2)
        n_shuffles = references.shape[1]
    dtype = _dtype(model, None) if isinstance(X, PackedSequence) else X.dtype
    _check_counts(n_shuffles, args, X.shape[0])
    batches, used = [], []
    with _at(model, device) as place:
        check_outputs(model, X[:1], args, dtype, place, "pisa")
        for i, _, _ in _progress(((i, i + 1, None) for i in range(X.shape[0])), X.shape[0], verbose):
            x = _rows(X, i, i + 1, dtype)
            if _is_given(references):
                refs = _rows(references, i, i + 1, dtype)
            else:
                refs = references(x, n=n_shuffles, random_state=random_state)
            more = None if args is None else tuple(arg[i : i + 1].to(place) for arg in args)
            call = _Call(model, x.to(place), refs.to(place), more, warning_threshold, print_convergence_deltas)
            maps = call.raw(None).transpose(1, 2) if raw_outputs else call.mean(None).cpu()
            batches.append(maps if raw_outputs or hypothetical else maps * x.cpu()[:, None])
            used.append(refs.to(place))
    return _result(batches, used, X, references, return_references)


# ---------------------------------------------------------------------------------------------------------------
# One call of the engine


def outputs(y: Tensor) -> Tensor:
    """``[N, outputs, 1, …]`` without the axes of length 1."""
    return y.reshape(y.shape[0], y.shape[1]) if y.dim() > 2 else y


class _Call:
    """Some sequences ``x [N, 4, length]`` with their references ``[N, R, 4, length]``."""

    def __init__(
        self, model: nn.Module, x: Tensor, refs: Tensor, more: tuple[Tensor, ...] | None, most: float, show: bool
    ) -> None:
        self.model, self.x, self.refs, self.more = model, x, refs, more
        self.most, self.show = most, show

    def mean(self, target: int | None) -> Tensor:
        """Hypothetical contributions, averaged over the references: of one output, or (None) ``[N, outputs, …]``."""
        method = DeepLiftShap(self.model, output=outputs)
        method.eps = EPS
        options: dict[str, Any] = {"hypothetical": True, "return_convergence_delta": True}
        options["additional_forward_args"] = self.more
        if target is None:
            maps, delta = method.attribute_all(self.x, self.refs, **options)
            change = (maps * self.x[:, None]).sum((2, 3))
        else:
            maps, delta = method.attribute(self.x, self.refs, target, **options)
            change = (maps * self.x).sum((1, 2))
        if bool((delta.abs() > self.most).any()):
            delta = self.checked(delta, target)
        self.say(delta, change, target)
        return maps.detach()

    def raw(self, target: int | None) -> Tensor:
        """The multipliers of every pair, ``[N, R, …]`` or (None) ``[N, outputs, R, …]``."""
        n, count = self.refs.shape[:2]
        multipliers, change = self.multipliers(torch.arange(n * count, device=self.x.device), target)
        y, before = self.ends(target)
        self.say(change - (y - before), change, target)
        multipliers = multipliers.detach().unflatten(0, (n, count))
        return multipliers if target is not None else multipliers.transpose(1, 2)

    def multipliers(self, pairs: Tensor, target: int | None) -> tuple[Tensor, Tensor]:
        """The multipliers of some pairs (numbered 0 … N · R - 1), and the sums of the resulting contributions."""
        samples = pairs // self.refs.shape[1]
        x, start = self.x[samples], self.refs.flatten(0, 1)[pairs]
        more = None if self.more is None else tuple(m[samples] for m in self.more)
        method = DeepLift(self.model, multiply_by_inputs=False, eps=EPS, output=outputs)
        if target is None:
            multipliers = method.attribute_all(x, start, additional_forward_args=more)
            return multipliers, (multipliers * (x - start)[:, None]).sum((2, 3))
        multipliers = method.attribute(x, start, target, additional_forward_args=more)
        return multipliers, (multipliers * (x - start)).sum((1, 2))

    def ends(self, target: int | None) -> tuple[Tensor, Tensor]:
        """The model's own outputs at the sequence and at the reference of every pair: ``[N · R]``, or (None)
        ``[N · R, outputs]``."""
        count, more = self.refs.shape[1], self.more or ()
        with torch.no_grad():
            y = outputs(self.model(self.x, *more)).repeat_interleave(count, 0)
            before = outputs(self.model(self.refs.flatten(0, 1), *(m.repeat_interleave(count, 0) for m in more)))
        return (y, before) if target is None else (y[:, target], before[:, target])

    def checked(self, delta: Tensor, target: int | None) -> Tensor:
        """The deltas.  Those that may be the rounding of large outputs are computed again from what the model itself
        returns, as tangermeme does: kernels sum in another order, which should not cause a warning."""
        y, before = self.ends(target)
        rounding = ROUNDING * torch.finfo(y.dtype).eps * (y.abs() + before.abs())
        near = (delta.abs() > self.most) & (delta.abs() <= rounding)
        delta = delta.clone()
        for pairs in near.view(near.shape[0], -1).any(1).nonzero()[:, 0].split(AGAIN):
            _, change = self.multipliers(pairs, target)
            delta[pairs] = change - (y - before)[pairs]
        return delta

    def say(self, delta: Tensor, change: Tensor, target: int | None) -> None:
        """tangermeme's warnings about convergence deltas; ``change``: the sums of attributions."""
        deltas = delta.abs()
        if bool((deltas > self.most).any()):
            warnings.warn(f"Convergence deltas too high: {deltas}", RuntimeWarning, stacklevel=4)
        if target is not None and float(deltas.mean()) > RELATIVE / 10 * float(change.abs().mean()):
            relative = float(deltas.mean() / torch.sub(*self.ends(target)).abs().mean().clamp_min(1e-12))
            if relative > RELATIVE:
                warnings.warn(
                    f"Convergence deltas are {relative:.1%} of the output differences: an operation in the model has "
                    "no DeepLIFT rule and is being treated as linear. See additional_nonlinear_ops.",
                    RuntimeWarning,
                    stacklevel=4,
                )
        if self.show:
            print(deltas)


# ---------------------------------------------------------------------------------------------------------------
# Arguments


def _not_ours(ops: dict[type, Any] | None, dtype: torch.dtype | None) -> str | None:
    """Why tangermeme itself has to run; None if gradkern can.  tangermeme's rules for other modules are not needed,
    because gradkern's hold for any operation."""
    own = {kind.__name__: rule for kind, rule in (ops or {}).items() if not _is_builtin(rule)}
    if own:
        return (
            f"additional_nonlinear_ops: {', '.join(own)}: rules that take module, grad_input and grad_output run in "
            "tangermeme itself. gradkern.attr.register_rule gives a module a rule on gradkern's engine."
        )
    if dtype in (torch.float16, torch.bfloat16):
        return f"dtype: {dtype}: mixed precision runs in tangermeme itself."
    return None


def _is_builtin(rule: Any) -> bool:
    return getattr(rule, "__module__", "").partition(".")[0] == "tangermeme" and rule.__name__[1:] in BUILT_IN


BUILT_IN = ("nonlinear", "maxpool", "softmax", "layernorm", "rmsnorm", "bilinear", "glu")


def _dtype(model: nn.Module, dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str):
        named: torch.dtype = getattr(torch, dtype)
        return named
    return next((p.dtype for p in model.parameters()), torch.float32)


def _check_counts(n_shuffles: int, args: tuple[Tensor, ...] | None, samples: int) -> None:
    if n_shuffles < 1:
        raise RuntimeError(f"n_shuffles: got {n_shuffles}, expected at least one reference per sequence.")
    for i, arg in enumerate(args or ()):
        if arg.shape[0] < samples:
            raise IndexError(f"args[{i}]: got {arg.shape[0]} rows, expected one for each of the {samples} sequences.")


def _is_given(references: Any) -> bool:
    return isinstance(references, (Tensor, PackedSequence))


def _rows(X: Any, a: int, b: int, dtype: torch.dtype) -> Tensor:
    """Sequences ``a:b``, decoded if they are packed."""
    rows = X[a:b]
    decoded: Tensor = rows.to_one_hot(dtype=dtype) if isinstance(rows, PackedSequence) else rows.type(dtype)
    return decoded


@contextmanager
def _at(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """Inside, the model is in eval mode on ``device`` (default: a GPU if there is one); afterwards it is as before."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    before = next((p.device for p in model.parameters()), None)
    training = {m: m.training for m in model.modules()}
    model.to(place).eval()
    try:
        yield place
    finally:
        for module, was in training.items():
            module.training = was
        if before is not None and before != place:
            model.to(before)


def check_outputs(model: nn.Module, X: Any, args: Any, dtype: torch.dtype, place: torch.device, name: str) -> None:
    """Run the model once; raise tangermeme's error for outputs that are not ``[N, outputs]``."""
    more = () if args is None else tuple(arg[:1].to(place) for arg in args)
    x = _rows(X, 0, 1, dtype).to(place).requires_grad_()
    with torch.no_grad():
        y = model(x.detach(), *(m.type(dtype) if name == "deep_lift_shap" else m for m in more))
    if y.dim() > 2 and y.shape[2:].numel() != 1:
        raise ValueError(
            f"{name} requires the model to return a (batch_size, n_outputs) tensor, optionally followed by axes of "
            f"length 1, but it returned shape {tuple(y.shape[1:])} per example. Wrap the model so that it returns one "
            "value per output, e.g., by summing or slicing the extra axes."
        )


def _references_of(
    X: Any, references: Any, count: int, batch_size: int, random_state: int | None, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(a, b, [b - a, count, 4, length])``: some samples at a time, with the references that tangermeme draws.

    Without a seed these depend on ``batch_size``.
    """
    n, size = X.shape[0], max(1, GROUP // count)
    if _is_given(references):
        for a in range(0, n, size):
            b = min(a + size, n)
            yield a, b, _rows(references, a, b, dtype)
        return
    waiting: list[Tensor] = []
    a = held = 0
    for at in range(0, n * count, batch_size):
        pairs = range(at, min(at + batch_size, n * count))
        samples = [p // count for p in pairs]
        x = X[samples].to_one_hot(dtype=dtype) if isinstance(X, PackedSequence) else X[samples].cpu().type(dtype)
        waiting.append(_drawn(references, x, [p % count for p in pairs], random_state))
        held += len(pairs)
        if held >= size * count or pairs.stop == n * count:
            rows, whole = torch.cat(waiting), held // count
            yield a, a + whole, rows[: whole * count].unflatten(0, (whole, count)).type(dtype)
            waiting, a, held = [rows[whole * count :]], a + whole, held - whole * count


def _drawn(references: Any, x: Tensor, numbers: list[int], random_state: int | None) -> Tensor:
    """One reference for each row of ``x``: reference ``k`` of every sample by the seed ``random_state + k``."""
    if random_state is None:
        rows: Tensor = references(x, n=1)[:, 0]
    elif references is dinucleotide_shuffle:
        rows = references(x, n=1, random_state=[random_state + k for k in numbers])[:, 0]
    else:
        drawn = [references(x[j : j + 1], n=1, random_state=random_state + k)[:, 0] for j, k in enumerate(numbers)]
        rows = torch.cat(drawn)
    return rows


def _progress(rows: Any, total: int, verbose: bool) -> Iterator[Any]:
    if not verbose:
        yield from rows
        return
    from tqdm import tqdm

    with tqdm(total=total) as bar:
        for row in rows:
            yield row
            bar.update(row[1] - row[0])


def _result(multipliers: list[Tensor], used: list[Tensor], X: Any, references: Any, wanted: bool) -> Any:
    maps = torch.cat(multipliers).detach()
    if not wanted:
        return maps
    refs: Any = torch.cat(used)
    if isinstance(X, PackedSequence) or isinstance(references, PackedSequence):
        with suppress(ValueError):  # references that are not one-hot stay a tensor
            refs = PackedSequence.from_one_hot(refs)
    return AttributionReferencesResult(attributions=maps, references=refs)
