"""NoiseTunnel: SmoothGrad, SmoothGrad-squared and VarGrad, summed as they are computed.

Captum draws the noise of all N samples times ``nt_samples`` at once and holds as many maps.  Here the same numbers
are drawn piece by piece, so that neither noise nor maps grow with ``nt_samples``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch.request import jacobian_choice
from ..dispatch.route import one_call
from ..dispatch.targets import Seeds
from ..util.options import BadType
from . import captum_compat as compat
from .attribute_all import Inputs, Options, RowMethod, Tensors, answer, one_by_one, points_for, typed
from .call import PublicMethod
from .captum_compat import stock
from .points import Points, block_rows, gradient_bytes, rows_of

FILL = 16  # torch fills normal numbers in blocks of 16: pieces of whole blocks continue one sequence


class NoiseTunnel(PublicMethod, stock.NoiseTunnel):
    """An average over noisy copies of the input (SmoothGrad, arXiv:1706.03825; VarGrad, arXiv:1810.03307).

    A drop-in for `captum.attr.NoiseTunnel`, with equal numbers for equal seeds.  Whether to attribute logits or
    probabilities depends on the method inside; noise moves probabilities off their plateaus.
    """

    @compat.log_usage(part_of_slo=True)
    @one_call()
    def attribute(
        self,
        inputs: Inputs,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As Captum's; a batch too large for one block goes through in pieces of samples."""
        rows = compat.format_tensor_into_tuples(inputs)
        pieces = [] if draw_baseline_from_distrib else self._pieces(rows, nt_samples, stdevs, kwargs)
        if len(pieces) < 2:
            return compat.unlogged(stock.NoiseTunnel)(
                self, inputs, nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib, **kwargs
            )
        compat.validate_noise_tunnel_type(nt_type, compat.SUPPORTED_NOISE_TUNNEL_TYPES)
        with torch.no_grad():
            return self._in_pieces(inputs, pieces, nt_type, nt_samples, nt_samples_batch_size, stdevs, kwargs)

    def _pieces(self, rows: Tensors, samples: int, stdevs: Any, kwargs: Options) -> list[tuple[int, int]]:
        """Pieces of samples whose noise continues Captum's sequence of numbers; none if Captum takes the call."""
        method = self.attribution_method
        if not isinstance(method, RowMethod) or method._indivisible():
            return []
        if not all(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in rows):
            return []
        if not isinstance(stdevs, (float, tuple)) or (isinstance(stdevs, tuple) and len(stdevs) != len(rows)):
            return []
        if points_for(method, rows, kwargs.get("additional_forward_args")) is None:
            return []
        return _spans(rows[0].shape[0], max(FILL, _block(rows, samples, 1)))

    def _in_pieces(
        self,
        inputs: Any,
        pieces: list[tuple[int, int]],
        nt_type: str,
        samples: int,
        batch: int | None,
        stdevs: Any,
        kwargs: Options,
    ) -> Any:
        rows = compat.format_tensor_into_tuples(inputs)
        n = rows[0].shape[0]
        wants_delta = self.is_delta_supported and bool(kwargs.get("return_convergence_delta"))
        average = _Average(rows, [x.shape for x in rows])
        for count in _draws(samples, batch):
            noise = Noise(rows, count, stdevs)
            for a, b in pieces:
                options = {k: _rows_of_option(v, a, b, n) for k, v in kwargs.items()}
                self._expand_partial(count, options, tuple(x[a:b] for x in rows), False)
                noisy = noise.piece(a, b)
                maps, _, delta = self._compute_partial_attribution(noisy, options, compat.is_tuple(inputs), wants_delta)
                average.add(a, b, count, maps, delta)
            noise.finish()
        maps = average.smoothed(self, nt_type, samples)
        result = maps if compat.is_tuple(inputs) else maps[0]
        return (result, average.delta()) if wants_delta else result

    @typed
    @one_call()
    def attribute_all(
        self,
        inputs: Inputs,
        *,
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
        compat.validate_noise_tunnel_type(nt_type, compat.SUPPORTED_NOISE_TUNNEL_TYPES)
        rows, method = compat.format_tensor_into_tuples(inputs), self.attribution_method
        unknown = kwargs.keys() - inspect.signature(method.attribute).parameters.keys()
        if unknown:
            raise BadType(
                f"NoiseTunnel.attribute_all: got {min(unknown)!r}, which {type(method).__name__} does not take."
            )
        wants_delta = self.is_delta_supported and return_convergence_delta
        points = points_for(method, rows, additional_forward_args) if isinstance(method, RowMethod) else None
        if points is not None:
            seeds, _ = points.choose(jacobian_choice(targets))
            run = _AllOutputs(self, rows, points, seeds, kwargs, draw_baseline_from_distrib, wants_delta)
            average = run.average(nt_samples, nt_samples_batch_size, stdevs)
            if average is not None:
                maps = average.smoothed(self, nt_type, nt_samples)
                return answer(maps, compat.is_tuple(inputs), seeds, average.delta() if wants_delta else None)
        options = kwargs | ({"return_convergence_delta": True} if wants_delta else {})
        fixed = (nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib)

        def attribute(target: Any) -> Any:
            arguments = {"target": target, "additional_forward_args": additional_forward_args}
            return self.attribute(inputs, *fixed, **arguments, **options)

        return one_by_one(method.forward_func, inputs, additional_forward_args, targets, attribute)


class _Average:
    """Sums and squares of the maps of all noisy copies, of shapes ``[N, …]``, and their convergence deltas."""

    def __init__(self, rows: Tensors, shapes: Sequence[Sequence[int]]) -> None:
        self.sums = [torch.zeros(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, rows, strict=True)]
        self.squares = [torch.zeros_like(s) for s in self.sums]
        self.deltas: list[Tensor] = []

    def add(self, a: int, b: int, copies: int, maps: Sequence[Tensor], delta: Tensor | None) -> None:
        """The maps ``[(b - a) · copies, …]`` of copies of the samples ``a:b``."""
        for total, square, m in zip(self.sums, self.squares, maps, strict=True):
            m = m.detach().reshape(b - a, copies, *m.shape[1:])
            total[a:b] += m.sum(1)
            square[a:b] += (m * m).sum(1)
        if delta is not None:
            self.deltas.append(delta)

    def smoothed(self, tunnel: NoiseTunnel, nt_type: str, samples: int) -> Tensors:
        mean, mean_sq = (tuple(s * 1 / samples for s in sums) for sums in (self.sums, self.squares))
        smoothed: Tensors = tunnel._compute_smoothing(mean, mean_sq, nt_type)
        return smoothed

    def delta(self) -> Tensor:
        return torch.cat(self.deltas)


class _AllOutputs:
    """One call of `NoiseTunnel.attribute_all` on the engine."""

    def __init__(
        self,
        tunnel: NoiseTunnel,
        rows: Tensors,
        points: Points,
        seeds: Seeds,
        options: Options,
        draw: bool,
        delta: bool,
    ) -> None:
        self.tunnel, self.rows, self.points, self.seeds = tunnel, rows, points, seeds
        self.options, self.draw, self.wants_delta = options, draw, delta
        self.sums = _Average(rows, [(x.shape[0], seeds.count, *x.shape[1:]) for x in rows])

    def average(self, samples: int, batch: int | None, stdevs: Any) -> _Average | None:
        """The average over all copies; None if the method has no Program."""
        draws = _draws(samples, batch)
        with torch.no_grad():
            shared = self._expanded(draws[0])
            for count in draws:
                if not self._one_draw(count, stdevs, shared if count == draws[0] else self._expanded(count)):
                    return None
        return self.sums

    def _expanded(self, count: int) -> Options:
        """The inner method's options for ``count`` copies of every sample, with baselines drawn if requested."""
        options = dict(self.options)
        if self.draw:
            self.tunnel._expand_partial(count, options, self.rows, True)
        return options

    def _one_draw(self, count: int, stdevs: Any, options: Options) -> bool:
        n = self.rows[0].shape[0]
        size = _block(self.rows, count, self.seeds.count)
        size = n if any(x.device.type != "cpu" for x in self.rows) else max(size, FILL)
        noise = Noise(self.rows, count, stdevs)
        for a, b in _spans(n, size):
            if not self._piece(noise.piece(a, b), a, b, count, options):
                return False
        noise.finish()
        return True

    def _piece(self, noisy: Tensors, a: int, b: int, count: int, options: Options) -> bool:
        """Add the samples ``a:b``, whose copies are consecutive rows, in blocks of rows."""
        method = self.tunnel.attribution_method
        index, more = self.seeds.rows(a, b), [x[a:b] for x in self.points.more]
        room = block_rows(gradient_bytes(self.rows, self.seeds.count), self.rows[0].device)
        for first, last, step, stop in _row_blocks(b - a, count, room):
            take = slice(first * count + step, (last - 1) * count + stop)
            rows, copies = tuple(x[take].detach() for x in noisy), stop - step
            these = index if index is None or index.dim() == 1 else index[first:last].repeat_interleave(copies, 0)
            piece_options = {k: self._option(v, k, a + first, a + last, step, stop, count) for k, v in options.items()}
            extra = tuple(x[first:last].repeat_interleave(copies, 0) for x in more)
            points = self.points.at(rows, extra)
            maps = method._rows(points, these, self.seeds.count, piece_options)
            if maps is None:
                return False
            delta = None
            if self.wants_delta:
                seeds = Seeds(self.seeds.count, self.seeds.axes, these)
                delta = method._row_delta(maps, points, seeds, piece_options)
            self.sums.add(a + first, a + last, copies, maps, delta)
        return True

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
            generator = torch.Generator()
            generator.set_state(torch.get_rng_state())
            self.generators = [generator]
            for x in rows[:-1]:
                generator = generator.clone_state()
                for size in _even(x.numel() * copies):  # the random numbers that this input will use
                    torch.normal(0.0, torch.ones(size), generator=generator)
                self.generators.append(generator)

    def piece(self, a: int, b: int) -> tuple[Tensor, ...]:
        """The copies of the samples ``a:b``, ``[(b - a) · copies, *in]`` per input.  Pieces must follow each other."""
        noisy = []
        for x, stdev, generator in zip(self.rows, self.stdevs, self.generators, strict=True):
            size = ((b - a) * self.copies, *x.shape[1:])
            spread = torch.tensor(stdev, device=x.device).repeat(size)
            noise = torch.normal(0, spread) if generator is None else torch.normal(0, spread, generator=generator)
            noisy.append(x[a:b].repeat_interleave(self.copies, dim=0) + noise)
        return tuple(noisy)

    def finish(self) -> None:
        """Leave torch's generator where Captum would."""
        last = self.generators[-1]
        if last is not None:
            torch.set_rng_state(last.get_state())


def _even(total: int, piece: int = 1 << 20) -> Iterator[int]:
    """``total`` in pieces: all but the last are whole blocks, and the last is not shorter than one block."""
    while total >= 2 * piece:
        yield piece
        total -= piece
    yield total


def _block(rows: Sequence[Tensor], copies: int, seeds: int) -> int:
    """Samples per piece, in whole blocks of the random sequence."""
    return max(1, block_rows(gradient_bytes(rows, seeds), rows[0].device) // max(copies, 1)) // FILL * FILL


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


def _draws(samples: int, batch: int | None) -> list[int]:
    """Copies per draw: as many as ``batch`` at a time, and the rest."""
    batch = samples if batch is None else min(samples, batch)
    return [batch] * (samples // batch) + ([samples % batch] if samples % batch else [])


def _rows_of_option(value: Any, a: int, b: int, n: int) -> Any:
    """An option of the inner method for the samples ``a:b``, cut if it has a row for each sample."""
    if isinstance(value, tuple) and not all(isinstance(v, int) for v in value):
        return tuple(_rows_of_option(v, a, b, n) for v in value)
    per_sample = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[a:b] if per_sample and len(value) == n > 1 else value


def _spans(n: int, size: int) -> list[tuple[int, int]]:
    """Pieces of ``size`` samples; the last one takes the rest, so that none is shorter than a block of numbers."""
    starts = list(range(0, max(n - size, 0) + 1, size))
    return [(a, n if a == starts[-1] else a + size) for a in starts]
