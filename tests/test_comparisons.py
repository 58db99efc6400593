"""The comparisons that tests and benchmarks share see every number that is not finite where it should be, or is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.zoo import network
from tests.support import cpu_replay, deeplift_operations, oracle, pools, properties

NAN, INF = math.nan, math.inf


def raises(compare: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], bool]:
    """Whether an assertion finds a difference."""

    def differ(got: Tensor, want: Tensor) -> bool:
        try:
            compare(got, want)
        except AssertionError:
            return True
        return False

    return differ


#: Whether two tensors ``[2, 3]`` differ, by each of the shared comparisons.
DIFFER: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "relative_error": lambda got, want: oracle.relative_error(got, want) > 1.0,
    "largest_error": lambda got, want: oracle.largest_error([want, got, want], [want, want, want]) > 1.0,
    "sample_errors": lambda got, want: bool((oracle.sample_errors(got, want) > 1.0).any()),
    "disagreeing": lambda got, want: oracle.disagreeing(got, want, 1.0) > 0.0,
    "accuracy": lambda got, want: bool((accuracy.errors(got, want) > 1.0).any()),
    "properties": raises(properties.close),
    "pools": raises(pools.equal),
    "cpu_replay": lambda got, want: not cpu_replay.close(got, want),
}


def right() -> Tensor:
    return torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (0, slice(None)), (slice(None), slice(None))], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", DIFFER)
def test_a_number_that_is_not_finite_differs_from_a_finite_one(name: str, bad: float, place: tuple) -> None:
    got, want = right(), right()
    assert not DIFFER[name](got, want)
    got[place] = bad
    assert DIFFER[name](got, want)


@pytest.mark.parametrize("pair", [(1.0, NAN), (1.0, INF), (NAN, INF), (INF, -INF)], ids=str)
@pytest.mark.parametrize("name", DIFFER)
def test_nan_and_each_infinity_equal_only_themselves(name: str, pair: tuple[float, float]) -> None:
    got, want = right(), right()
    got[1, 0], want[1, 0] = pair
    assert DIFFER[name](got, want)
    assert name == "properties" or not DIFFER[name](want.clone(), want)  # which demands finite numbers


def test_a_finite_error_beside_equal_infinities_is_measured_by_the_finite_numbers() -> None:
    got, want = right(), right()
    got[0, 0] = want[0, 0] = INF
    got[0, 1] += 0.2
    assert oracle.relative_error(got, want) == pytest.approx(0.2 / 3)
    assert oracle.sample_errors(got, want).tolist() == pytest.approx([0.1, 0.0])
    assert oracle.disagreeing(got, want, 0.05) == 0.5


def test_another_shape_is_an_error() -> None:
    for compare in (oracle.relative_error, oracle.sample_errors, oracle.disagreeing):
        with pytest.raises(AssertionError):
            compare(right()[:1], right())


def test_completeness_sees_a_multiplier_that_is_nan() -> None:
    x, base = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    multipliers = torch.ones(2, 1, 3, dtype=torch.float64)
    total = lambda t: t.sum(1, keepdim=True)  # noqa: E731
    assert deeplift_operations.incomplete(total, multipliers, x, base) == 0.0
    multipliers[1, 0, 2] = NAN
    assert not deeplift_operations.incomplete(total, multipliers, x, base) < 1.0


def test_the_error_column_of_the_zoo_shows_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(3, 2), right().float()
    assert network.error(model, x, [0, 1]) < 1e-12
    jacobian = network.gradkern.jacobian
    monkeypatch.setattr(network.gradkern, "jacobian", lambda *args, **kw: jacobian(*args, **kw) * torch.tensor(NAN))
    assert network.error(model, x, [0, 1]) == INF
