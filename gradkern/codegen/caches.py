"""How much of a CPU core's caches each decision counts on.

The sizes are fixed, so that plans and bits do not depend on the processor's caches.  They suit cores with 48 KiB of L1
and 1 to 2 MiB of L2, and were chosen by measurement.
"""

L1_BYTES = 24 << 10  # of weights that a record reads again for every position; larger weights are walked tile by tile
LARGE_WEIGHT_BYTES = 256 << 10  # of weights that are read once for several samples,
LARGE_WEIGHT_POSITIONS = 16  # if a sample uses them at no more positions than this
BLOCK_BYTES = 512 << 10  # of the scratch of a thread's block of samples
SEED_BYTES = 256 << 10  # of the cotangents of one sample's tile of seeds
HEAVY_WEIGHTS = 1 << 18  # numbers of a layer's weight that a chain reads again for every sample (`planner/heavy.py`),
HEAVY_POSITIONS = 64  # if a sample uses them at no more positions than this
HOT_BYTES = 768 << 10  # of a thread's Jacobians that are summed while they are in the cache
SPILLED_BYTES = 2 << 20  # of the Jacobians of a block of samples, at most, even if they leave the cache
