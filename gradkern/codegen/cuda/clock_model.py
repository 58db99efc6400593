"""The expected cost of the GPU's kernels, as pure functions of a record and of how the work is cut.

The unit is a clock of one multiprocessor.  A loop takes the longer of two times: that of issuing its instructions, and
that of its loads.  The rates are four instructions, and 128 bytes of shared memory or L1, per clock, times the share of
them that loops reach (`PACE`).  Plain numbers in the arguments of `loop` are counts: the instructions, and the
wavefronts of loads, of one turn in sm_90 machine code (nvcc 13.0).  `PACE`, `BARRIER`, `LOADED` and `STORED` are fitted
to an H200's times, record by record (benchmarks/results/gpu-h200-records.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import product
from typing import NamedTuple

from .. import limits, records

WARP = 32
QUAD_COUNTS = (2, 3, 5, 6)  # the numbers of quads per lane that csrc/cuda/quads.cuh is compiled for
QUAD_LANES = (4, 8, 16, 32)  # the numbers of lanes of a worker for quads
DECODE = {1: 1.7, 2: 3.5, 3: 7, 4: 7}  # by the number of taps: instructions to find the one that a channel came from
PARTIAL_SUMS = 4096  # the least elements of the workspace for a whole-block record, for parts of long sums
PACE = 0.33  # the share of the issue rate, and of the load unit's, that loops reach (measured: 0.2 to 0.5)
BARRIER = 1500  # clocks from one record to the next (measured: 1200 to 2500)
LOADED, STORED = 2.8, 0.65  # clocks for each number of an input, and of a result
L2_PACE = 24.0  # bytes per clock that one of an H200's multiprocessors gets from L2 while all of them read

#: Records whose price is only the step from one record to the next: they touch each number once, or a few times.
BARRIERS = frozenset({
    records.Stencil, records.Elementwise, records.Add, records.Move, records.Multiply,
    records.Lines, records.Rectify, records.SeedRows, records.SeedOneHot, records.SeedDense, records.StencilT,
    records.PatternT, records.ElementwiseT, records.Accumulate, records.MoveT, records.MultiplyT, records.LinesT,
})  # fmt: skip
#: The bands that a transposed convolution can have, by the offset of its weights.
BandOptions = Mapping[int, list[records.Bands]]


def loop(instructions: float, wavefronts: float) -> float:
    """Clocks of a warp's loop if all warps are busy, from the instructions that it issues and the 128-byte wavefronts
    that it loads."""
    return max(instructions / 4, wavefronts) / PACE


def busy(items: float, workers: float) -> float:
    """The share of workers that have work."""
    return items / (math.ceil(items / workers) * workers)


def even(count: int, most: int) -> int:
    """The size of even parts of at most ``most``."""
    return math.ceil(count / math.ceil(count / most))


@dataclass(frozen=True)
class Work:
    """How the work is cut: samples at a time in scratch (``resident``), in a block, and seeds at a time."""

    warps: int
    resident: int
    block: int
    tile: int
    itemsize: int
    band_options: BandOptions

    def samples(self, op: records.Record) -> int:
        """How many samples pass the record together."""
        return self.block if op.whole_block else self.resident

    def clocks(self, op: records.Record, forward: bool) -> float:
        """Clocks of a record per sample, and in the backward pass per tile of seeds."""
        clocks, copies = BARRIER / self.samples(op), 1 if forward else self.tile
        match op:
            case _ if type(op) in BARRIERS:
                pass
            case records.Load(extent=e):
                clocks += e.C * e.H * e.W * LOADED
            case records.Store(extent=e) | records.StoreT(extent=e):
                clocks += copies * e.C * e.H * e.W * STORED
            case records.Window():
                clocks += self.window(op)
            case records.Pattern(extent=e, pattern=p):
                clocks += e.H * e.W * p.plane_bytes * 2 / WARP * loop(80 + 45 * p.taps, 8 + 4 * p.taps)
            case records.Zero(elements=n):
                clocks += copies * n / 4 / WARP * loop(10, 4)
            case records.MatMul():
                clocks += self.matmul(op, copies)
            case records.DenseT():
                clocks += self.product(op)
            case records.ScatterT():
                clocks += self.transposed(op)[0]
            case _:
                raise TypeError(f"{type(op).__name__} has no price: it is not a record of a GPU's chain, or is new")
        return clocks

    def window(self, op: records.Window) -> float:
        """A forward contraction: multiply-adds at the share of busy warps, or the load of the weight from L2."""
        samples = self.samples(op)
        taps = op.pattern.taps if isinstance(op, records.PooledWindow) else 0
        positions = samples * (1 if op.whole_block else op.H * op.W * max(taps, 1))
        lanes = 8 if op.O > 16 else 4 if op.O > 8 else 2 if op.O > 4 else 1
        each = limits.POOLED.of(self.itemsize) if taps else 4  # positions of a thread
        tiles = math.ceil(op.O / (4 * lanes)) * math.ceil(positions * lanes / (each * WARP)) * op.groups
        share = busy(tiles * (max(self.warps // tiles, 1) if op.whole_block else 1), self.warps)
        # A term: 4 multiply-adds per position, loads and addresses.  Without whole quads, a load gets only one number.
        term = loop(4 * each + 7, each / 4 + 2) if op.run_length % 4 == 0 else loop(5 * each + 7, each + 1)
        terms = op.runs * op.run_length
        work = tiles * (terms * term + loop((20 if taps else 10) * each + 40, 5 * each)) / share
        return max(work, terms * op.O * self.itemsize / L2_PACE if op.whole_block else 0.0) / samples

    def product(self, op: records.DenseT) -> float:
        """A linear layer backward, one tile of seeds: rows in whole tiles of the kernel, or the weight from L2."""
        rows, columns = self.block * self.tile, op.window_elements
        height = min((16, 12, 8, 4), key=lambda h: math.ceil(rows / (2 * h)) * h)
        items = math.ceil(rows / (2 * height)) * math.ceil(columns / 64)
        parts = max(min(self.warps // items, op.O // limits.PART_ROWS), 1)  # warps that share a sum
        work = items * op.O * loop(4 * height + 10, height / 4 + 2) / busy(items * parts, self.warps)
        if parts > 1:
            work += parts * (BARRIER + loop(12 * height, 2 * height))
        spread = rows * op.O / WARP * loop(24, 2)  # the cotangents, transposed into the workspace
        return (max(work, columns * op.O * self.itemsize / L2_PACE) + spread) / self.block

    def matmul(self, op: records.MatMul, copies: int) -> float:
        """A product of two matrices of values: 4 × 4 results per thread, as csrc/cuda/matmul.cuh has it."""
        tiles = self.resident * copies * op.matrices * math.ceil(op.rows / 4) * math.ceil(op.columns / 4)
        rounds = math.ceil(tiles / (self.warps * WARP)) * self.warps
        return rounds * loop(164 + 28 * op.terms, 32 + 8 * op.terms) / self.resident

    def transposed(self, op: records.ScatterT) -> tuple[float, int, records.Bands]:
        """A transposed convolution: its clocks, and the lanes of a worker and the bands that make it cheapest."""
        shape = ScatterShape(
            op.algorithm, elements=op.window_elements, channels=op.O, taps=op.pattern.taps if op.pattern else 1,
            merged=op.merged, pattern=op.pattern is not None,
        )  # fmt: skip
        found = []
        for way in scatter_ways(shape, self.tile, self.itemsize):
            workers = self.warps * (WARP // way.lanes)
            for bands in self.band_options[op.weights]:
                share = busy_bands(op.H, op.W, bands, self.resident * way.visits, workers)
                found.append((op.H * op.W * way.clocks / share, way.lanes, bands))
        return min(found)


@lru_cache(1 << 14)
def busy_bands(high: int, wide: int, bands: records.Bands, copies: int, workers: int) -> float:
    """The share of workers that have positions to visit, over the turns of all colours.

    There are ``high`` × ``wide`` positions in each of ``copies``, one for each sample and visit.
    """

    def parts(extent: int, length: int, colours: int) -> list[int]:
        """Bands of each colour along an axis."""
        return [(math.ceil(extent / length) + colours - 1 - colour) // colours for colour in range(colours)]

    axes = parts(high, bands.rows, bands.row_colours), parts(wide, bands.columns, bands.column_colours)
    busiest = sum(math.ceil(copies * down * across / workers) for down, across in product(*axes))
    return copies * high * wide / (workers * busiest * bands.rows * bands.columns)


@dataclass
class RunPrice:
    """The price per sample of a run of records, by how many samples it takes at a time."""

    whole_block: bool  # whether it is a single record that takes the whole block
    work: Work
    ops: list[tuple[records.Record, bool, int]] = field(default_factory=list)
    steps: dict[int, float] = field(default_factory=dict)  # prices of a step, by its number of samples

    def add(self, op: records.Record, forward: bool, times: int) -> None:
        self.ops.append((op, forward, times))

    def price(self, resident: int, block: int) -> float:
        work = replace(self.work, resident=resident, block=block)
        return sum(times * work.clocks(op, forward) for op, forward, times in self.ops)

    def step(self, samples: int) -> float:
        """The price per sample if ``samples`` of them pass together."""
        if samples not in self.steps:
            self.steps[samples] = self.price(samples, 0)
        return self.steps[samples]

    def best(self, block: int, most: int) -> tuple[float, int]:
        """The lowest price per sample of a block with at most ``most`` resident samples, and how many are resident."""
        return min((in_steps(self.step, block, n), n) for n in even_steps(block) if n <= most)


@cache
def even_steps(block: int) -> tuple[int, ...]:
    """The numbers of samples per step that divide a block into even steps, for every number of steps."""
    return tuple(sorted({math.ceil(block / steps) for steps in range(1, block + 1)}))


def in_steps(price: Callable[[int], float], block: int, resident: int) -> float:
    """The price per sample of a block that takes ``resident`` samples at a time, and the rest in a last step.

    ``price``: the price per sample of a step, by its number of samples.
    """
    full, left = divmod(block, resident)
    return (full * resident * price(resident) + (left * price(left) if left else 0.0)) / block


def worker_lanes(elements: int) -> int:
    """Lanes of a worker that walks over live channels, for a window of ``elements``: as few as leave no lane idle."""
    fitting = [lanes for lanes in (4, 8, 16) if elements <= lanes * limits.WALK_ELEMENTS] + [WARP]
    return min(fitting, key=lambda lanes: lanes * math.ceil(elements / lanes))


def live_share(planes: int, pattern: bool) -> float:
    """The share of channels that carry a cotangent: half if a ReLU follows, three in four if a pool follows as well."""
    return 0.75 if planes > 1 else 0.5 if pattern else 1.0


@dataclass(frozen=True)
class ScatterShape:
    """What the price of a transposed convolution depends on, apart from its positions."""

    algorithm: records.ScatterAlgorithm
    elements: int  # elements of the window
    channels: int
    taps: int  # taps of the pool through whose bits the cotangent is read
    merged: bool  # the taps share one window
    pattern: bool  # the cotangent is read through bits


class ScatterWay(NamedTuple):
    """A size of workers for a transposed convolution."""

    clocks: float  # per pool output, for all seeds, if all warps are busy
    visits: int  # how often every position is visited, each time for some of the seeds
    lanes: int  # lanes of a worker


@lru_cache
def scatter_ways(shape: ScatterShape, seeds: int, itemsize: int) -> list[ScatterWay]:
    """The sizes of workers that a transposed convolution can have."""
    elements, channels, pattern = shape.elements, shape.channels, shape.pattern
    planes, windows = (shape.taps, 1.0) if shape.merged else (1, shape.taps)
    if shape.algorithm == records.ScatterAlgorithm.Walk:
        most = limits.WALK_SEEDS.of(itemsize)
        visits, together = math.ceil(seeds / most), even(seeds, most)
        one = walk_clocks(elements, channels, shape.merged, together, shape.taps, pattern)
        return [ScatterWay(visits * one, visits, worker_lanes(elements))]
    if shape.algorithm == records.ScatterAlgorithm.Quads:
        ways = []
        for lanes in QUAD_LANES:
            one, visits = quad_clocks(elements // 4, channels, seeds, planes, pattern, lanes, itemsize)
            ways.append(ScatterWay(windows * one, visits, lanes))
        return ways
    one, visits = narrow_clocks(elements, channels, seeds, planes, itemsize)
    return [ScatterWay(windows * one, visits, limits.NARROW_LANES)]


def walk_clocks(elements: int, channels: int, merged: bool, seeds: int, planes: int, pattern: bool) -> float:
    """Clocks per pool output and group of seeds.

    Each live channel costs its loads and multiply-adds, for a few elements of the window per lane: 15.5 instructions, 3
    per element, 2.5 per seed, and one per element and seed.  Each walk costs a start of 30 instructions and a
    read-add-write of three per sum.  The walks of a warp end with its longest.
    """
    lanes = worker_lanes(elements)
    workers, each = WARP // lanes, math.ceil(elements / lanes)
    walks = 1 if merged else planes
    live = channels * live_share(planes, pattern) / walks
    longest = live + 0.6 * math.log2(workers) * math.sqrt(live / 2)  # roughly the largest of `workers` binomial counts
    step = loop(
        (15.5 + 3 * each + 2.5 * seeds + each * seeds) * longest, (each * max(1, workers / 2) + 1.5 * seeds) * live
    )
    return walks * (step + loop(30 + 3 * each * seeds, 2 * each * seeds)) / workers


def quad_clocks(
    quads: int, channels: int, seeds: int, planes: int, pattern: bool, lanes: int, itemsize: int
) -> tuple[float, int]:
    """Clocks per pool output, all visits together, and the number of visits; the kernel is in csrc/cuda/quads.cuh.

    Each channel costs a load and four multiply-adds per seed for every quad of a lane, 10 instructions and those of
    `DECODE`, and 1.6 per seed for the cotangents (6 more with two quads per lane).  The start and the read-add-write of
    the sums cost 40 instructions, and six per quad and seed.
    """
    widest = limits.QUADS.of(itemsize)
    each = next((n for n in QUAD_COUNTS if math.ceil(quads / lanes) <= n <= widest), widest)
    chunks, most = math.ceil(quads / (lanes * each)), min(limits.QUAD_SEEDS, limits.QUAD_SUMS.of(itemsize) // each)
    visits, together, workers = math.ceil(seeds / most), even(seeds, most), WARP // lanes
    walked = channels * (live_share(planes, pattern) if workers == 1 and each == 2 else 1.0)
    rows = min(planes, 2) if workers > 1 else 1  # rows of the weight that the workers of a warp read in one step
    step = loop(
        each * (4 * together + 1) + (10 + DECODE[max(planes, 1)]) + 1.6 * together + 6 * (each == 2),
        each * max(1, lanes * 16 * rows / 128) + together * workers / 4,
    )
    ends = loop(40 + 6 * each * together, 8 * each * together)
    return visits * chunks * (walked * step + ends) / workers, visits


def narrow_clocks(width: int, channels: int, seeds: int, planes: int, itemsize: int) -> tuple[float, int]:
    """Clocks per pool output, all visits together, and the number of visits; the kernel is in csrc/cuda/quads.cuh.

    Four lanes take four channels each, so a round covers 16.  Per channel it costs a multiply-add per element and seed,
    a load per quad of the row, and `DECODE`; per round, 67 instructions and 10 per seed.  At the end, the lanes add up
    their sums.
    """
    most, rounds = limits.NARROW_SEEDS.of(itemsize), math.ceil(channels / 16)
    visits, together = math.ceil(seeds / most), even(seeds, most)
    width = next(w for w in (4, 6, 8) if width <= w)
    sums, rows = math.ceil(width * together / 4) * 4, math.ceil(width / 4)
    each = 4 * (width * together + rows) + 67 + 4 * DECODE[max(planes, 1)] + 10 * together
    ends = 40 + 3 * sums + 4 * sums / 4
    return visits * loop(rounds * each + ends, rounds * (8 * together + 8 * rows + planes) + sums / 2) / 8, visits
