"""NoiseTunnel: SmoothGrad, SmoothGrad-squared and VarGrad, summed as they are computed.

Captum draws the noise of all N samples times ``nt_samples`` at once and holds as many maps.  Here the same numbers
are drawn piece by piece, so that neither noise nor maps grow with ``nt_samples``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch.route import one_call
from ..dispatch.targets import Seeds, jacobian_choice
from ..util.chunks import RowBlock, row_blocks
from ..util.options import BadType
from . import captum_compat as compat
from .attribute_all import Inputs, Options, RowMethod, Tensors, answer, as_attribute_all, one_by_one, points_for
from .call import PublicMethod
from .captum_compat import stock
from .points import Points, block_rows, gradient_bytes, rows_of

FILL = 16  # torch fills normal numbers in blocks of 16


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
        """Captum's ``attribute``; a batch too large for one block is cut into pieces of samples."""
        rows = compat.format_tensor_into_tuples(inputs)
        copies = nt_samples if nt_samples_batch_size is None else min(nt_samples, nt_samples_batch_size)
        if draw_baseline_from_distrib or not self._goes_in_pieces(rows, copies, stdevs, kwargs):
            return compat.unlogged(stock.NoiseTunnel)(
                self, inputs, nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib, **kwargs
            )
        compat.validate_noise_tunnel_type(nt_type, compat.SUPPORTED_NOISE_TUNNEL_TYPES)
        with torch.no_grad():
            return self._in_pieces(inputs, nt_type, nt_samples, nt_samples_batch_size, stdevs, kwargs)

    def _goes_in_pieces(self, rows: Tensors, copies: int, stdevs: Any, kwargs: Options) -> bool:
        """Whether the batch is too large for one block, and may be cut."""
        method = self.attribution_method
        if not isinstance(method, RowMethod) or method._indivisible():
            return False
        if not all(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in rows):
            return False
        if not isinstance(stdevs, (float, tuple)) or (isinstance(stdevs, tuple) and len(stdevs) != len(rows)):
            return False
        if rows[0].shape[0] * copies <= _room(rows):
            return False
        return points_for(method, rows, kwargs.get("additional_forward_args")) is not None

    def _in_pieces(
        self, inputs: Any, nt_type: str, samples: int, batch: int | None, stdevs: Any, kwargs: Options
    ) -> Any:
        rows = compat.format_tensor_into_tuples(inputs)
        n, room = rows[0].shape[0], _room(rows)
        wants_delta = self.is_delta_supported and bool(kwargs.get("return_convergence_delta"))
        average = _Average(rows, [x.shape for x in rows])
        for count in _draws(samples, batch):
            noise = Noise(rows, count, stdevs)
            for block in row_blocks(n, count, room):
                options = {k: _rows_of_option(v, block.a, block.b, n) for k, v in kwargs.items()}
                self._expand_partial(block.copies, options, tuple(x[block.a : block.b] for x in rows), False)
                noisy = noise.of(block)
                maps, _, delta = self._compute_partial_attribution(noisy, options, compat.is_tuple(inputs), wants_delta)
                average.add(block, maps, delta)
            noise.finish()
        maps = average.smoothed(self, nt_type, samples)
        result = maps if compat.is_tuple(inputs) else maps[0]
        return (result, average.delta()) if wants_delta else result

    @as_attribute_all
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
            run = AllOutputs(self, rows, points, seeds, kwargs, draw_baseline_from_distrib, wants_delta)
            average = run.average(nt_samples, nt_samples_batch_size, stdevs)
            if average is not None:
                maps = average.smoothed(self, nt_type, nt_samples)
                return answer(maps, compat.is_tuple(inputs), seeds, average.delta() if wants_delta else None)
        options = kwargs | ({"return_convergence_delta": True} if wants_delta else {})
        fixed = (nt_type, nt_samples, nt_samples_batch_size, stdevs, draw_baseline_from_distrib)

        def attribute(target: Any) -> Any:
            arguments = {"target": target, "additional_forward_args": additional_forward_args}
            return self.attribute(inputs, *fixed, **arguments, **options)

        return one_by_one(method.forward_func, inputs, additional_forward_args, targets, attribute, wants_delta)


class _Average:
    """Sums and squares of the maps of all noisy copies, of shapes ``[N, …]``, and their convergence deltas."""

    def __init__(self, rows: Tensors, shapes: Sequence[Sequence[int]]) -> None:
        self.sums = [torch.zeros(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, rows, strict=True)]
        self.squares = [torch.zeros_like(s) for s in self.sums]
        self.deltas: list[Tensor] = []

    def add(self, block: RowBlock, maps: Sequence[Tensor], delta: Tensor | None) -> None:
        """Add the maps ``[R, …]`` of a block of copies."""
        for total, square, m in zip(self.sums, self.squares, maps, strict=True):
            m = m.detach().reshape(block.b - block.a, block.copies, *m.shape[1:])
            total[block.a : block.b] += m.sum(1)
            square[block.a : block.b] += (m * m).sum(1)
        if delta is not None:
            self.deltas.append(delta)

    def smoothed(self, tunnel: NoiseTunnel, nt_type: str, samples: int) -> Tensors:
        mean, mean_sq = (tuple(s * 1 / samples for s in sums) for sums in (self.sums, self.squares))
        smoothed: Tensors = tunnel._compute_smoothing(mean, mean_sq, nt_type)
        return smoothed

    def delta(self) -> Tensor:
        return torch.cat(self.deltas)


class AllOutputs:
    """One call of `NoiseTunnel.attribute_all` on the engine.

    ``shapes``: those of the attributions ``[N, S, …]``, if they differ from those of the inputs.
    """

    def __init__(
        self,
        tunnel: NoiseTunnel,
        rows: Tensors,
        points: Points,
        seeds: Seeds,
        options: Options,
        draw: bool,
        delta: bool,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.tunnel, self.rows, self.points, self.seeds = tunnel, rows, points, seeds
        self.options, self.draw, self.wants_delta = options, draw, delta
        shapes = [(x.shape[0], seeds.count, *x.shape[1:]) for x in rows] if shapes is None else shapes
        self.result = _Average(rows[: len(shapes)], shapes)
        map_bytes = sum(s[0].nbytes for s in self.result.sums if len(s))
        self.point_bytes = max(1, map_bytes, gradient_bytes(rows, seeds.count))

    def average(self, samples: int, batch: int | None, stdevs: Any) -> _Average | None:
        """The average over all copies; None if the method has no Program."""
        draws = _draws(samples, batch)
        with torch.no_grad():
            shared = self._expand(draws[0])
            for count in draws:
                if not self._one_draw(count, stdevs, shared if count == draws[0] else self._expand(count)):
                    return None
        return self.result

    def _expand(self, count: int) -> Options:
        """The inner method's options for ``count`` copies of every sample, with baselines drawn if requested."""
        options = dict(self.options)
        if self.draw:
            self.tunnel._expand_partial(count, options, self.rows, True)
        return options

    def _one_draw(self, count: int, stdevs: Any, options: Options) -> bool:
        noise = Noise(self.rows, count, stdevs)
        room = block_rows(self.point_bytes, self.rows[0].device)
        for block in row_blocks(self.rows[0].shape[0], count, room):
            if not self._add_block(noise.of(block), block, count, options):
                return False
        noise.finish()
        return True

    def _add_block(self, rows: Tensors, block: RowBlock, count: int, options: Options) -> bool:
        """Add the attributions of the noisy ``rows`` of a block, of ``count`` copies of every sample in all."""
        method, rows = self.tunnel.attribution_method, tuple(x.detach() for x in rows)
        seeds = self.seeds.part(block.a, block.b).repeat_interleave(block.copies)
        options = {k: self._option(v, k, block, count) for k, v in options.items()}
        points = self.points.at(rows, tuple(map(block.copies_of, self.points.more)))
        maps = method.row_maps(points, seeds, options)
        if maps is None:
            return False
        delta = None
        if self.wants_delta:
            delta = method._row_delta(maps, points, seeds, options)
        self.result.add(block, maps, delta)
        return True

    def _option(self, value: Any, name: str, block: RowBlock, count: int) -> Any:
        """A baseline's rows for a block of copies."""
        if name != "baselines" or value is None:
            return value
        n = self.rows[0].shape[0]

        def rows(base: Any) -> Any:
            if not isinstance(base, Tensor) or not base.dim() or base.shape[0] == 1:
                return base
            if self.draw or base.shape[0] == n * count:
                return base[block.a * count + block.first : (block.b - 1) * count + block.last]
            return rows_of(base, block.a, block.b).repeat_interleave(block.copies, 0)

        return tuple(rows(base) for base in value) if isinstance(value, tuple) else rows(value)


class Noise:
    """The noisy copies of all samples in Captum's order, drawn row by row from torch's generator.

    Captum draws the noise of one input after the other.  So each input has its own generator, which starts where that
    of the input before would have ended.
    """

    def __init__(self, rows: Sequence[Tensor], copies: int, stdevs: float | tuple[float, ...]) -> None:
        if isinstance(stdevs, tuple):
            assert len(stdevs) == len(rows), (
                f"The number of input tensors in {len(rows)} must be equal to the number of stdevs values {len(stdevs)}"
            )
        else:
            assert isinstance(stdevs, float), f"stdevs must be type float. Given: {type(stdevs)}"
            stdevs = (stdevs,) * len(rows)
        self.rows, self.copies = rows, copies
        self.streams: list[_Stream] = []
        generator: torch.Generator | None = None
        for i, (x, stdev) in enumerate(zip(rows, stdevs, strict=True)):
            if len(rows) > 1 and x.device.type == "cpu":
                generator = _default_copy() if i == 0 else self.streams[-1].spent()
            self.streams.append(_Stream(x.numel() * copies, stdev, x.device, generator))

    def of(self, block: RowBlock) -> tuple[Tensor, ...]:
        """The noisy copies of a block, ``[R, *in]`` per input.  Blocks have to be requested in order."""
        noisy = []
        for x, stream in zip(self.rows, self.streams, strict=True):
            copies = block.copies_of(x)
            noisy.append(copies + stream.take(copies.numel()).view(copies.shape))
        return tuple(noisy)

    def finish(self) -> None:
        """Leave torch's generator where Captum would."""
        generator = self.streams[-1].generator
        if generator is not None:
            torch.set_rng_state(generator.get_state())


def _default_copy() -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


class _Stream:
    """The ``total`` normal numbers that one call of `torch.normal` draws, some at a time.

    On a CPU torch fills blocks of 16 numbers one after the other.  If the last block would not be whole, the last 16
    numbers are drawn once more.  So whole blocks are drawn here, and the last draw has at least one.
    """

    def __init__(self, total: int, stdev: float, device: torch.device, generator: torch.Generator | None) -> None:
        self.total, self.drawn, self.generator = total, 0, generator
        self.stdev, self.kept = torch.tensor(stdev, device=device), torch.empty(0, device=device)

    def take(self, count: int) -> Tensor:
        """The next ``count`` numbers."""
        missing = count - len(self.kept)
        if missing > 0:
            left = self.total - self.drawn
            size = -(-missing // FILL) * FILL
            size = left if self.stdev.device.type != "cpu" or left - size < FILL else size
            fresh = torch.normal(0, self.stdev.repeat(size), generator=self.generator)
            self.drawn += size
            self.kept = torch.cat([self.kept, fresh]) if len(self.kept) else fresh
        taken, self.kept = self.kept[:count], self.kept[count:]
        return taken

    def spent(self) -> torch.Generator:
        """A generator in the state after all numbers of this stream."""
        assert self.generator is not None
        twin = _Stream(self.total, 1.0, self.stdev.device, self.generator.clone_state())
        while twin.drawn < self.total:
            twin.take(min(self.total - twin.drawn, 1 << 20))
            twin.kept = twin.kept[:0]
        assert twin.generator is not None
        return twin.generator


def _room(rows: Sequence[Tensor]) -> int:
    """How many noisy copies fit in a block."""
    return block_rows(gradient_bytes(rows, 1), rows[0].device)


def _draws(samples: int, batch: int | None) -> list[int]:
    """The copies of each draw: ``batch`` at a time, and the rest in the last one."""
    batch = samples if batch is None else min(samples, batch)
    return [batch] * (samples // batch) + ([samples % batch] if samples % batch else [])


def _rows_of_option(value: Any, a: int, b: int, n: int) -> Any:
    """An option of the inner method for the samples ``a:b``, cut if it has a row for each sample."""
    if isinstance(value, tuple) and not all(isinstance(v, int) for v in value):
        return tuple(_rows_of_option(v, a, b, n) for v in value)
    per_sample = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    if not per_sample or len(value) != n or n < 2:
        return value
    return value[a] if isinstance(value, list) and b - a == 1 else value[a:b]  # Captum expands no list of one target
