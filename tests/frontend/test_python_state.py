"""Never stale, generated: whatever Python state a forward reads may change between two calls.

A kind of state is three pieces of source: its definition, an expression that reads a number from it, and a statement
that gives it another number.  Random networks read several kinds in random places.
"""

from __future__ import annotations

import itertools
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradkern
from gradkern.dispatch import first_use

pytestmark = [pytest.mark.real_export, pytest.mark.filterwarnings("ignore::gradkern.GradkernWarning")]
NUMBERS = itertools.count()
Kind = tuple[str, str, str]
#: ``@`` stands for the number of the state in its network, ``$`` for a number.
KINDS: dict[str, Kind] = {
    "module-level scalar": ("s@ = $", "s@", "s@ = $"),
    "module-level string": ("t@ = '$'", "float(len(t@))", "t@ = 'x' * abs(int(3 * $))"),
    "module-level dict": ("d@ = {'a': $}", "d@['a']", "d@['a'] = $"),
    "module-level list": ("l@ = [0.0, $]", "l@[1]", "l@[1] = $"),
    "length of a list": ("n@ = [0]", "float(len(n@))", "n@.append(0)"),
    "members of a set": ("m@ = {'a'}", "(2.0 if 'b' in m@ else 1.0)", "m@.symmetric_difference_update({'b'})"),
    "keys of a dict": ("k@ = {}", "float(len(k@) + 1)", "k@[$] = 0"),
    "order of a dict": ("o@ = {'a': 1.0, 'b': 2.0}", "next(iter(o@.values()))", "o@['a'] = o@.pop(next(iter(o@))) + $"),
    "nested containers": ("c@ = {'a': [0, (1, {'b': [$]})]}", "c@['a'][1][1]['b'][0]", "c@['a'][1][1]['b'][0] = $"),
    "deque": ("q@ = collections.deque([$])", "q@[0]", "q@.appendleft($)"),
    "default dict": ("e@ = collections.defaultdict(lambda: 1.5)", "e@['a']", "e@['a'] = $"),
    "named tuple": ("T@ = collections.namedtuple('T@', 'a')\nv@ = T@($)", "v@.a", "v@ = T@($)"),
    "class attribute": ("class A@:\n    value = $", "A@.value", "A@.value = $"),
    "inherited attribute": ("class B@:\n    value = $\nclass D@(B@): pass\nd2@ = D@()", "d2@.value", "B@.value = $"),
    "shadowed attribute": ("class F@:\n    value = $\nf@ = F@()", "f@.value", "f@.value = $"),
    "config object": ("class G@: pass\ng@ = G@()\ng@.value = $", "g@.value", "g@.value = $"),
    "namespace": ("ns@ = types.SimpleNamespace(value=$)", "ns@.value", "ns@.value = $"),
    "object with slots": ("class H@:\n    __slots__ = ('value',)\nh@ = H@()\nh@.value = $", "h@.value", "h@.value = $"),
    "property over a class's dict": (
        "class P@:\n    table = {'a': $}\n    value = property(lambda self: self.table['a'])\np@ = P@()",
        "p@.value",
        "P@.table['a'] = $",
    ),
    "property replaced": (
        "class Q@:\n    value = property(lambda self: $)\nq2@ = Q@()",
        "q2@.value",
        "Q@.value = property(lambda self: $)",
    ),
    "closure cell": (
        "def make@(value):\n    def read(): return value\n    def write(new):\n"
        "        nonlocal value\n        value = new\n    return read, write\nread@, write@ = make@($)",
        "read@()",
        "write@($)",
    ),
    "closure dict": (
        "def close@(box):\n    return (lambda: box['a']), box\nlook@, box@ = close@({'a': $})",
        "look@()",
        "box@['a'] = $",
    ),
    "helper function": ("def u@(): return $", "u@()", "def u@(): return $"),
    "code of a function": ("def w@(): return $", "w@()", "def new@(): return $\nw@.__code__ = new@.__code__"),
    "method": ("class I@:\n    def value(self): return $\ni@ = I@()", "i@.value()", "I@.value = lambda self: $"),
    "inherited method": (
        "class Ba@:\n    def value(self): return $\nclass De@(Ba@): pass\nde@ = De@()",
        "de@.value()",
        "Ba@.value = lambda self: $",
    ),
    "method that hides another": (
        "class Bb@:\n    def value(self): return 1.0\nclass Df@(Bb@): pass\ndf@ = Df@()",
        "df@.value()",
        "Df@.value = lambda self: $",
    ),
    "code of a method": (
        "class Co@:\n    def value(self): return $\nco@ = Co@()",
        "co@.value()",
        "Co@.value.__code__ = (lambda self: $).__code__",
    ),
    "method made by a function": (
        "def mm@(k):\n    def value(self): return k\n    return value\nclass Mm@:\n    value = mm@($)\nmv@ = Mm@()",
        "mv@.value()",
        "Mm@.value = mm@($)",
    ),
    "class method": (
        "class Cm@:\n    value = classmethod(lambda cls: $)",
        "Cm@.value()",
        "Cm@.value = classmethod(lambda cls: $)",
    ),
    "method of a new object": (
        "class No@:\n    def value(self): return $",
        "No@().value()",
        "No@.value = lambda self: $",
    ),
    "initialiser": (
        "class In@:\n    def __init__(self): self.value = $",
        "In@().value",
        "def init@(self): self.value = $\nIn@.__init__ = init@",
    ),
    "call operator": (
        "class Ca@:\n    def __call__(self): return $\nca@ = Ca@()",
        "ca@()",
        "Ca@.__call__ = lambda self: $",
    ),
    "truth": (
        "class Tr@:\n    def __bool__(self): return True\nbo@ = Tr@()",
        "(2.0 if bo@ else 1.0)",
        "Tr@.__bool__ = lambda self: False",
    ),
    "length": (
        "class Le@:\n    def __len__(self): return 3\nle@ = Le@()",
        "float(len(le@))",
        "Le@.__len__ = lambda self: 5",
    ),
    "missing attribute": (
        "class Mi@:\n    def __getattr__(self, name): return $\nmi@ = Mi@()",
        "mi@.value",
        "Mi@.__getattr__ = lambda self, name: $",
    ),
    "attribute that comes": ("class At@: pass\nat@ = At@()", "getattr(at@, 'value', 1.0)", "at@.value = $"),
    "descriptor": (
        "class Ds@:\n    def __get__(self, owner, kind): return $\nclass Dt@:\n    value = Ds@()\ndt@ = Dt@()",
        "dt@.value",
        "Ds@.__get__ = lambda self, owner, kind: $",
    ),
    "forward": (
        "class Fo@(nn.Module):\n    def forward(self, h): return h * $\nfo@ = Fo@()",
        "fo@(h)",
        "Fo@.forward = lambda self, h: h * $",
    ),
    "forward of a base class": (
        "class Fb@(nn.Module):\n    def forward(self, h): return h * $\nclass Fd@(Fb@): pass\nfd@ = Fd@()",
        "fd@(h)",
        "Fb@.forward = lambda self, h: h * $",
    ),
    "forward of an object": ("fi@ = nn.Tanh()", "fi@(h)", "fi@.forward = lambda h: h * $"),
    "method of a module": (
        "class Me@(nn.Module):\n    def value(self): return $\nme@ = Me@()",
        "me@.value()",
        "Me@.value = lambda self: $",
    ),
    "function of torch": ("ft@ = torch.sin", "ft@(h)", "ft@ = torch.cos"),
    "static method": (
        "class J@:\n    value = staticmethod(lambda: $)",
        "J@.value()",
        "J@.value = staticmethod(lambda: $)",
    ),
    "mutable default": ("def x@(box=[$]): return box[0]", "x@()", "x@.__defaults__[0][0] = $"),
    "defaults": ("def y@(value=$): return value", "y@()", "y@.__defaults__ = ($,)"),
    "keyword defaults": ("def z@(*, value=$): return value", "z@()", "z@.__kwdefaults__['value'] = $"),
    "function in a dict": ("fs@ = {'f': lambda: $}", "fs@['f']()", "fs@['f'] = lambda: $"),
    "partial": (
        "pa@ = functools.partial(lambda a: a, $)",
        "pa@()",
        "pa@ = functools.partial(lambda a: a, $)",
    ),
    "class swapped": (
        "class K@:\n    def value(self): return 1.0\nclass L@(K@):\n    def value(self): return $\nk2@ = K@()",
        "k2@.value()",
        "k2@.__class__ = L@ if type(k2@) is K@ else K@",
    ),
    "other module": ("mo@ = types.ModuleType('mo@')\nmo@.value = $", "mo@.value", "mo@.value = $"),
    "enum by name": (
        "class E@(enum.Enum):\n    A = $\n    B = 2.0\ne2@ = E@.A",
        "e2@.value",
        "e2@ = E@.B if e2@ is E@.A else E@.A",
    ),
    "tensor read by item": ("ti@ = torch.tensor($)", "ti@.item()", "ti@.fill_($)"),
    "tensor replaced": ("tr@ = torch.tensor($).double()", "tr@", "tr@ = torch.tensor($).double()"),
    "tensor in a list": ("tl@ = [torch.tensor($).double()]", "tl@[0]", "tl@[0].fill_($)"),
    "numpy array": ("na@ = numpy.array([$])", "float(na@[0])", "na@[0] = $"),
}
LEFT_TO_AUTOGRAD = {name: KINDS.pop(name) for name in ("tensor read by item", "numpy array")}
GROUPS = [list(KINDS)[k::14] for k in range(14)]
#: Ways of reading a number ``{0}`` for a hidden layer ``h``.
PLACES = (
    "h * {0}",
    "h + {0}",
    "torch.where(h > 0, h * {0}, h)",
    "(h * 2 if {0} > 1.3 else h.tanh() * {0})",
    "self.inner(h, lambda: {0})",
    "nn.functional.leaky_relu(h, 0.1 * {0})",
    "sum([h.roll(1, 1) * {0} for _ in range(2)])",
)
NETWORK = """
class Base(nn.Module):
    def forward(self, x):
        h = self.first(x)
        {lines}
        return self.last(h)

class Network(Base):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def inner(self, h, number):
        return (h * number()).tanh()
"""
IMPORTS = "import collections, enum, functools, types\nimport numpy, torch\nfrom torch import nn"


class World:
    """A network in a module of its own, and the state that it reads."""

    def __init__(
        self, kinds: list[Kind], places: list[str], draw: random.Random, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.kinds, self.draw = kinds, draw
        module = types.ModuleType(f"state_{next(NUMBERS)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # as the module of any code is
        self.names: dict[str, Any] = vars(module)
        definitions = [self._filled(kind[0], k) for k, kind in enumerate(kinds)]
        reads = [self._filled(kind[1], k) for k, kind in enumerate(kinds)]
        lines = [f"h = {place.format(read)}" for place, read in zip(places, reads, strict=True)]
        network = NETWORK.format(lines="\n        ".join(lines))
        exec("\n".join([IMPORTS, *definitions, network]), self.names)
        self.model: nn.Module = self.names["Network"]().double().eval()

    def change(self, k: int) -> None:
        exec(self._filled(self.kinds[k][2], k), self.names)

    def _filled(self, source: str, k: int) -> str:
        return source.replace("@", str(k)).replace("$", str(round(self.draw.uniform(0.5, 2.5), 3)))


def expect(model: Callable[..., torch.Tensor], x: torch.Tensor, engine: str, told: str) -> torch.Tensor:
    """The engine gives autograd's Jacobian, which is returned."""
    got = gradkern.jacobian(model, x, engine=engine)
    want = gradkern.jacobian(model, x, engine="autograd")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda text: f"{told}: {text}")
    return want.clone()


@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_every_kind_of_state_is_seen(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels: autograd would pass this test whatever the guards see."""
    kinds = [KINDS[name] for name in names]
    world, x = World(kinds, ["h * {0}"] * len(kinds), random.Random(0), monkeypatch), torch.randn(3, 4).double()
    before = expect(world.model, x, "kernel", "at first")
    for k, name in enumerate(names):
        world.change(k)
        after = expect(world.model, x, "kernel", name)
        assert not torch.allclose(after, before, rtol=1e-6), name
        before = after
        assert gradkern.prepare(world.model, x).program is not None, name


@pytest.mark.parametrize("name", LEFT_TO_AUTOGRAD)
def test_numbers_out_of_tensors_are_left_to_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, x = LEFT_TO_AUTOGRAD[name], torch.randn(3, 4).double()
    world = World([kind], ["h * {0}"], random.Random(0), monkeypatch)
    before = expect(world.model, x, "kernel", "at first")
    world.change(0)
    assert not torch.allclose(expect(world.model, x, "kernel", name), before, rtol=1e-6)


@pytest.mark.parametrize("engine", ["kernel", "auto"])
@pytest.mark.parametrize("seed", range(4))
def test_random_networks_see_every_change(seed: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "capture_cost", lambda: 0.0)  # "auto" has switched
    draw = random.Random(seed)
    names = draw.sample(list(KINDS), 3)
    world = World([KINDS[name] for name in names], draw.sample(PLACES, 3), draw, monkeypatch)
    x = torch.randn(3, 4).double()
    expect(world.model, x, engine, "at first")
    for k in draw.sample(range(3), 2):
        world.change(k)
        expect(world.model, x[: draw.randint(1, 3)], engine, names[k])
