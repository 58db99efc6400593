"""NoiseTunnel: SmoothGrad, SmoothGrad-squared and VarGrad, summed as they are computed.

Captum draws the noise of all N samples times ``nt_samples`` at once and holds as many maps.  Here the same numbers
are drawn piece by piece, so that neither noise nor maps grow with ``nt_samples``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from captum import attr as captum_attr
from captum._utils.common import _format_tensor_into_tuples, _is_tuple
from captum.attr._core.noise_tunnel import SUPPORTED_NOISE_TUNNEL_TYPES
from captum.attr._utils.common import _validate_noise_tunnel_type
from captum.log import log_usage
from torch import Tensor

from ..dispatch.request import jacobian_choice
from ..dispatch.targets import Seeds
from .attribute_all import RowMethod, answer, each_output, points_for, resolved, with_indices
from .points import BLOCK_BYTES, LEAST_BLOCK, Points, part, rows_of

FILL = 16  # torch fills normal numbers in blocks of 16: pieces of whole blocks continue one sequence


class NoiseTunnel(captum_attr.NoiseTunnel):
    """An average over noisy copies of the input (SmoothGrad, arXiv:1706.03825; VarGrad, arXiv:1810.03307).

    A drop-in for `captum.attr.NoiseTunnel`, with equal numbers for equal seeds.  What to attribute, logits or
    probabilities, is as for the method inside; noise moves probabilities off their plateaus.
    """

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As Captum's; a batch too large for one block goes through in pieces of samples."""
        rows = _format_tensor_into_tuples(inputs)
        pieces = None
        if not draw_baseline_from_distrib and isinstance(self.attribution_method, RowMethod):
            pieces = self._pieces(rows, nt_samples, stdevs, kwargs)
        if pieces is None or len(pieces) < 2:
            return captum_attr.NoiseTunnel.attribute.__wrapped__(
                self, inputs, nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib, **kwargs
            )
        with torch.no_grad():
            _validate_noise_tunnel_type(nt_type, SUPPORTED_NOISE_TUNNEL_TYPES)
            return self._in_pieces(inputs, pieces, nt_type, nt_samples, nt_samples_batch_size, stdevs, kwargs)

    def _pieces(
        self, rows: tuple[Tensor, ...], samples: int, stdevs: Any, kwargs: dict[str, Any]
    ) -> list[tuple[int, int]] | None:
        """Pieces of samples whose noise continues Captum's sequence of numbers; None where there are none."""
        if not all(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in rows):
            return None
        if not isinstance(stdevs, (float, tuple)) or (isinstance(stdevs, tuple) and len(stdevs) != len(rows)):
            return None
        if points_for(self.attribution_method, rows, kwargs.get("additional_forward_args")) is None:
            return None
        n = rows[0].shape[0]
        size = max(FILL, _block(rows, samples, 1))
        return _spans(n, size)

    def _in_pieces(
        self,
        inputs: Any,
        pieces: list[tuple[int, int]],
        nt_type: str,
        nt_samples: int,
        batch: int | None,
        stdevs: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        rows, many = _format_tensor_into_tuples(inputs), _is_tuple(inputs)
        delta_wanted = self.is_delta_supported and bool(kwargs.get("return_convergence_delta"))
        batch = nt_samples if batch is None else min(nt_samples, batch)
        draws = [batch] * (nt_samples // batch) + ([nt_samples % batch] if nt_samples % batch else [])
        sums: list[Any] = [None] * len(rows)
        squares: list[Any] = [None] * len(rows)
        deltas: list[Tensor] = []
        for count in draws:
            noise = Noise(rows, count, stdevs)
            for a, b in pieces:
                here = tuple(x[a:b] for x in rows)
                given = {k: _rows_of_option(v, a, b, rows[0].shape[0]) for k, v in kwargs.items()}
                self._expand_partial(count, given, here, False)
                found, _, delta = self._compute_partial_attribution(noise.piece(a, b), given, many, delta_wanted)
                partial: list[Any] = [None] * len(found)
                partial_sq: list[Any] = [None] * len(found)
                self._update_partial_attribution_and_delta(
                    found, delta, partial, partial_sq, deltas, count, delta_wanted
                )
                for i in range(len(found)):
                    sums[i] = _added(sums[i], partial[i], a, b, rows[i].shape[0])
                    squares[i] = _added(squares[i], partial_sq[i], a, b, rows[i].shape[0])
            noise.finish()
        mean = tuple(s * 1 / nt_samples for s in sums)
        mean_sq = tuple(s * 1 / nt_samples for s in squares)
        found = self._compute_smoothing(mean, mean_sq, nt_type)
        delta = torch.cat(deltas) if delta_wanted else None
        return self._apply_checks_and_return_attributions(found, many, delta_wanted, delta)

    def attribute_all(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Any = None,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Every output (or ``targets``, as `gradkern.jacobian` reads them) at once: ``[N, C, *in]``.

        All outputs share the noise.  ``kwargs`` are the inner method's; the delta is per draw, as Captum's.
        """
        _validate_noise_tunnel_type(nt_type, SUPPORTED_NOISE_TUNNEL_TYPES)
        rows, many = _format_tensor_into_tuples(inputs), _is_tuple(inputs)
        method = self.attribution_method
        delta_wanted = self.is_delta_supported and return_convergence_delta
        points = points_for(method, rows, additional_forward_args) if isinstance(method, RowMethod) else None
        if points is not None:
            seeds, _ = points.choose(jacobian_choice(targets))
            run = _AllNoise(self, rows, points, seeds, kwargs, draw_baseline_from_distrib, delta_wanted)
            found = run(nt_type, nt_samples, nt_samples_batch_size, stdevs)
            if found is not None:
                return answer(found, many, seeds, run.delta())
        seeds, out = resolved(method.forward_func, rows, additional_forward_args, targets)
        options = kwargs | ({"return_convergence_delta": True} if delta_wanted else {})

        def attribute(target: Any) -> Any:
            return self.attribute(
                inputs,
                nt_type,
                nt_samples,
                nt_samples_batch_size,
                stdevs,
                draw_baseline_from_distrib,
                target=target,
                additional_forward_args=additional_forward_args,
                **options,
            )

        return with_indices(each_output(attribute, seeds, out, rows[0].shape[0]), seeds)


class _AllNoise:
    """One call of `NoiseTunnel.attribute_all` on the engine."""

    def __init__(
        self,
        tunnel: NoiseTunnel,
        rows: tuple[Tensor, ...],
        points: Points,
        seeds: Seeds,
        kwargs: dict[str, Any],
        draw: bool,
        delta: bool,
    ) -> None:
        self.tunnel, self.rows, self.points, self.seeds = tunnel, rows, points, seeds
        self.kwargs, self.draw, self.wants_delta = kwargs, draw, delta
        self.deltas: list[Tensor] = []
        shapes = [(x.shape[0], seeds.count, *x.shape[1:]) for x in rows]
        self.sums = [torch.zeros(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, rows, strict=True)]
        self.squares = [torch.zeros_like(s) for s in self.sums]

    def __call__(self, nt_type: str, samples: int, batch: int | None, stdevs: Any) -> tuple[Tensor, ...] | None:
        batch = samples if batch is None else min(samples, batch)
        draws = [batch] * (samples // batch) + ([samples % batch] if samples % batch else [])
        with torch.no_grad():
            shared = self._expanded(batch)
            for count in draws:
                if not self._one_draw(count, stdevs, shared if count == batch else self._expanded(count)):
                    return None
        mean = tuple(s * 1 / samples for s in self.sums)
        mean_sq = tuple(s * 1 / samples for s in self.squares)
        return self.tunnel._compute_smoothing(mean, mean_sq, nt_type)

    def delta(self) -> Tensor | None:
        return torch.cat(self.deltas) if self.wants_delta else None

    def _expanded(self, count: int) -> dict[str, Any]:
        """The inner method's options for ``count`` copies of every sample: baselines drawn where asked for."""
        options = dict(self.kwargs)
        if self.draw:
            self.tunnel._expand_partial(count, options, self.rows, True)
        return options

    def _one_draw(self, count: int, stdevs: Any, options: dict[str, Any]) -> bool:
        n = self.rows[0].shape[0]
        size = _block(self.rows, count, self.seeds.count)
        size = n if any(x.device.type != "cpu" for x in self.rows) else max(size, FILL)
        noise = Noise(self.rows, count, stdevs)
        for a, b in _spans(n, size):
            if not self._piece(noise.piece(a, b), a, b, count, options):
                return False
        noise.finish()
        return True

    def _piece(self, noisy: tuple[Tensor, ...], a: int, b: int, count: int, options: dict[str, Any]) -> bool:
        """The samples ``a:b``, their copies in rows that follow each other; block by block of rows."""
        index, more = part(self.seeds, a, b), [x[a:b] for x in self.points.more]
        for first, last, step, stop in _row_blocks(b - a, count, _block_rows(self.rows, self.seeds.count)):
            take = slice(first * count + step, (last - 1) * count + stop)
            rows = tuple(x[take].detach() for x in noisy)
            copies = stop - step
            these = index
            if index is not None and index.dim() == 2:
                these = index[first:last].repeat_interleave(copies, 0)
            here = {k: self._option(v, k, a + first, a + last, step, stop, count) for k, v in options.items()}
            extra = tuple(x[first:last].repeat_interleave(copies, 0) for x in more)
            method: Any = self.tunnel.attribution_method
            found = method._rows(rows, extra, these, self.seeds.count, here)
            if found is None:
                return False
            for total, square, g in zip(self.sums, self.squares, found, strict=True):
                g = g.view(last - first, copies, *g.shape[1:])  # [m, k, S, *in]
                total[a + first : a + last] += g.sum(1)
                square[a + first : a + last] += (g * g).sum(1)
            if self.wants_delta:
                self._note_delta(found, rows, extra, these, here)
        return True

    def _note_delta(
        self,
        found: Sequence[Tensor],
        rows: tuple[Tensor, ...],
        extra: tuple[Tensor, ...],
        index: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        method: Any = self.tunnel.attribution_method
        seeds = Seeds(self.seeds.count, self.seeds.axes, index)
        self.deltas.append(method._row_delta(found, rows, extra, seeds, options))

    def _option(self, value: Any, name: str, a: int, b: int, step: int, stop: int, count: int) -> Any:
        """A baseline's rows for the copies ``step:stop`` of the samples ``a:b``."""
        if name != "baselines" or value is None:
            return value
        n = self.rows[0].shape[0]

        def rows(base: Any) -> Any:
            if not isinstance(base, Tensor) or not base.dim() or base.shape[0] == 1:
                return base
            if self.draw or base.shape[0] == n * count:
                return base[a * count + step : (b - 1) * count + stop]
            return rows_of(base, a, b).repeat_interleave(stop - step, 0)

        return tuple(rows(base) for base in value) if isinstance(value, tuple) else rows(value)


class Noise:
    """The noisy copies of all samples in Captum's order, drawn piece by piece from torch's generator.

    The sequence of several inputs is drawn input after input, so each has a generator of its own that starts where
    the one before would have ended.
    """

    def __init__(self, rows: Sequence[Tensor], copies: int, stdevs: float | tuple[float, ...]) -> None:
        if isinstance(stdevs, tuple):
            assert len(stdevs) == len(rows), (
                f"The number of input tensors in {len(rows)} must be equal to the number of stdevs values {len(stdevs)}"
            )
        else:
            assert isinstance(stdevs, float), f"stdevs must be type float. Given: {type(stdevs)}"
            stdevs = (stdevs,) * len(rows)
        self.rows, self.copies, self.stdevs = rows, copies, stdevs
        self.generators: list[torch.Generator | None] = [None] * len(rows)
        if len(rows) > 1 and all(x.device.type == "cpu" for x in rows):
            state = torch.get_rng_state()
            for i, x in enumerate(rows):
                own = torch.Generator()
                own.set_state(state)
                self.generators[i] = own
                if i + 1 < len(rows):
                    burnt = torch.Generator()
                    burnt.set_state(state)
                    for size in _even(x.numel() * copies):
                        torch.normal(0.0, torch.ones(size), generator=burnt)
                    state = burnt.get_state()

    def piece(self, a: int, b: int) -> tuple[Tensor, ...]:
        """The copies of the samples ``a:b``, ``[(b - a) · copies, *in]`` per input.  Pieces must follow each other."""
        found = []
        for x, stdev, generator in zip(self.rows, self.stdevs, self.generators, strict=True):
            size = ((b - a) * self.copies, *x.shape[1:])
            spread = torch.tensor(stdev, device=x.device).repeat(size)
            noise = torch.normal(0, spread) if generator is None else torch.normal(0, spread, generator=generator)
            found.append(x[a:b].repeat_interleave(self.copies, dim=0) + noise)
        return tuple(found)

    def finish(self) -> None:
        """Leave torch's generator where Captum would."""
        last = self.generators[-1]
        if last is not None:
            torch.set_rng_state(last.get_state())


def _even(total: int, piece: int = 1 << 20) -> Iterator[int]:
    """``total`` as pieces, each but the last of whole blocks, the last not shorter than one block."""
    while total >= 2 * piece:
        yield piece
        total -= piece
    yield total


def _block_rows(rows: Sequence[Tensor], seeds: int) -> int:
    each = max(1, seeds) * sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in rows)
    return max(LEAST_BLOCK, BLOCK_BYTES // max(each, 1))


def _block(rows: Sequence[Tensor], copies: int, seeds: int) -> int:
    """Samples per piece, in whole blocks of the random sequence."""
    return max(1, _block_rows(rows, seeds) // max(copies, 1)) // FILL * FILL


def _row_blocks(samples: int, copies: int, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """``(first sample, last, first copy, last)``: whole samples together, or some copies of one sample."""
    if copies <= rows:
        step = max(1, rows // max(copies, 1))
        for a in range(0, samples, step):
            yield a, min(a + step, samples), 0, copies
        return
    for a in range(samples):
        for first in range(0, copies, rows):
            yield a, a + 1, first, min(first + rows, copies)


def _rows_of_option(value: Any, a: int, b: int, n: int) -> Any:
    """An option of the inner method for the samples ``a:b``, where it has a row for each sample."""
    if isinstance(value, tuple) and not all(isinstance(v, int) for v in value):
        return tuple(_rows_of_option(v, a, b, n) for v in value)
    if isinstance(value, (Tensor, list)) and len(_sized(value)) == n and n > 1:
        return value[a:b]
    return value


def _sized(value: Any) -> Any:
    return value if not isinstance(value, Tensor) or value.dim() else ()


def _added(total: Tensor | None, piece: Tensor, a: int, b: int, n: int) -> Tensor:
    if total is None:
        total = torch.zeros(n, *piece.shape[1:], dtype=piece.dtype, device=piece.device)
    total[a:b] += piece
    return total


def _spans(n: int, size: int) -> list[tuple[int, int]]:
    """Pieces of ``size`` samples; the last one takes the rest, so that none is shorter than a block of numbers."""
    starts = list(range(0, max(n - size, 0) + 1, size))
    return [(a, n if a == starts[-1] else a + size) for a in starts]
