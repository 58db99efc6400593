"""The compiled ops: opcheck, every check with its message, the content hash, scratch after a failure."""

from __future__ import annotations

import pytest
import torch

from gradkern.runtime import ops
from tests.support.op_arguments import (
    WRONG_CHAIN,
    WRONG_COTANGENTS,
    WRONG_SEEDS,
    arguments,
    forward_arguments,
)

ops.extension()  # registers them
G = torch.ops.gradkern


# ---------------------------------------------------------------------------------------------------------------
# opcheck


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_forward(dtype):
    torch.library.opcheck(G.chain_forward.default, forward_arguments(arguments(dtype=dtype)))


@pytest.mark.parametrize("group", [False, True])
def test_opcheck_vjp(group):
    torch.library.opcheck(G.chain_vjp.default, tuple(arguments(group=group).values()))


@pytest.mark.parametrize("pool", [[], [1, 2, 1, 2, 0, 1, 1, 1, 1, 4]])
def test_opcheck_rescale(pool):
    z = torch.randn(3, 2, 1, 6)
    torch.library.opcheck(G.rescale.default, (z, torch.randn(1, 2, 1, 6), pool, True, 1e-10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.randn(3, 2, 6)}, r"contiguous \[N, C, H, W\]"),
        ({"z": torch.randn(3, 2, 6, 2).transpose(2, 3)}, r"contiguous \[N, C, H, W\]"),
        ({"reference": torch.randn(2, 2, 1, 6)}, "one row or as many as z"),
        ({"reference": torch.randn(1, 2, 1, 6).double()}, "one row or as many as z"),
        ({"z": torch.randn(3, 2, 1, 6).half(), "reference": torch.randn(1, 2, 1, 6).half()}, "float32 or float64"),
        ({"relu": False}, "without a pool"),
        ({"pool": [1, 2, 1, 2]}, "a pool is 10 ints"),
        ({"pool": [1, 2, 0, 2, 0, 1, 1, 1, 1, 4]}, "has 0 in place 2"),
    ],
)
def test_rescale_refuses(change, message):
    given = {"z": torch.randn(3, 2, 1, 6), "reference": torch.randn(1, 2, 1, 6), "pool": [], "relu": True} | change
    with pytest.raises(RuntimeError, match=message):
        ops.rescale(**given, eps=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_relu_between_equal_infinities_has_its_derivative(dtype):
    """A max pool whose window lies wholly in the padding gives minus infinity, at the input and at the reference."""
    z = torch.tensor([-torch.inf, torch.inf, 0.0, -1.0, 2.0] * 5, dtype=dtype).view(1, 1, 1, -1)
    slopes = ops.rescale(z, z.clone(), (), True, 1e-10).flatten()
    assert torch.equal(slopes, torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0] * 5, dtype=dtype))


def test_opcheck_recurrent():
    g, x, y, result = (torch.randn(s) for s in ((2, 1, 5, 4), (2, 5, 3), (2, 5, 4), (2, 1, 5, 3)))
    weights = [torch.randn(12, 3), torch.randn(12, 4)]  # of a GRU
    torch.library.opcheck(G.recurrent.default, (x, weights, 2, True, y))
    torch.library.opcheck(G.recurrent_vjp.default, (g, x, y, weights, 2, True, False, result))


def test_opcheck_hash():
    # The result is a number that depends on the values: there is no fake of it, so nothing to check under one.
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(G.content_hash.default, ([torch.randn(3), torch.arange(5)],), test_utils=checks)


# ---------------------------------------------------------------------------------------------------------------
# Checks


@pytest.mark.parametrize("message", [*WRONG_CHAIN, *WRONG_SEEDS])
def test_vjp_refuses_wrong_arguments(message):
    found = arguments()
    (WRONG_CHAIN | WRONG_SEEDS)[message](found)
    with pytest.raises((RuntimeError, IndexError), match=message.replace("expected.*", "targets must be .*")):
        G.chain_vjp(*found.values())


@pytest.mark.parametrize("message", WRONG_CHAIN)
def test_forward_refuses_wrong_arguments(message):
    found = arguments()
    WRONG_CHAIN[message](found)
    with pytest.raises(RuntimeError, match=message):
        G.chain_forward(*forward_arguments(found))


@pytest.mark.parametrize("message", WRONG_COTANGENTS)
def test_vjp_refuses_wrong_cotangents(message):
    found = arguments(group=True)
    WRONG_COTANGENTS[message](found)
    with pytest.raises(RuntimeError, match=message):
        G.chain_vjp(*found.values())


def test_ops_refuse_dtypes_without_kernels():
    found = arguments()
    found.update(inputs=[x.half() for x in found["inputs"]], packed=found["packed"].half())
    with pytest.raises(RuntimeError, match="take float32 or float64, got Half"):
        G.chain_forward(*forward_arguments(found))


@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_survives_a_failed_allocation(threads):
    """An error inside the parallel region comes out as an error, and the next call has memory again."""
    torch.set_num_threads(threads)
    found = arguments(n=40)
    want = G.chain_forward(*forward_arguments(found))
    huge = dict(found, sizes=[1 << 49, *found["sizes"][1:]])
    with pytest.raises(RuntimeError, match=r"out of memory for .* bytes of scratch"):
        G.chain_forward(*forward_arguments(huge))
    assert torch.equal(G.chain_forward(*forward_arguments(found))[0], want[0])


# ---------------------------------------------------------------------------------------------------------------
# The content hash


def test_hash_sees_order_position_and_every_byte():
    a, b = torch.randn(2, 70)
    seen = [[a, b], [b, a], [a], [b], [a, a], [torch.cat([a, b])], [a[:35], a[35:]], [a, torch.zeros(0)]]
    assert len({ops.content_hash(tensors) for tensors in seen}) == len(seen)
    assert ops.content_hash([a, b]) == ops.content_hash([a.clone(), b.clone()])
    assert ops.content_hash([]) == ops.content_hash([])
    for size in (1, 2, 15, 16, 17, 33, 127, 129, 300):  # around the strides of 64 and 512 bytes
        x = torch.zeros(size)
        found = {ops.content_hash([x])}
        for i in range(size):
            y = x.clone()
            y[i] = 1e-45  # the last bit of one number
            found.add(ops.content_hash([y]))
        assert len(found) == size + 1


def test_hash_sees_swaps():
    x = torch.arange(64, dtype=torch.float32)
    hashes = {ops.content_hash([x])}
    for i, j in [(0, 1), (0, 16), (1, 17), (0, 63), (15, 16), (16, 32)]:
        y = x.clone()
        y[[i, j]] = y[[j, i]]
        hashes.add(ops.content_hash([y]))
    assert len(hashes) == 7


def test_hash_reads_values_not_strides():
    x = torch.randn(6, 7)
    assert ops.content_hash([x.T]) == ops.content_hash([x.T.contiguous()])
    assert ops.content_hash([x.T]) != ops.content_hash([x])


def test_an_extension_with_other_records_is_not_used(monkeypatch):
    """Rows that are encoded otherwise than the kernels read them would be garbage."""
    monkeypatch.setattr(ops, "layout_fingerprint", lambda: "of another version")
    with pytest.warns(RuntimeWarning, match="built from another version and is not used"):
        assert ops.extension.__wrapped__() is None
