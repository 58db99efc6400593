"""
Captum, with one import changed
===============================

Code that uses Captum keeps its calls and its numbers; `attribute_all` then gives every class in one call.
"""

import copy
import time

import captum.attr
import torch
from demo import arrow_heads, train

import gradkern.attr
from gradkern import plot

torch.manual_seed(0)
problem = arrow_heads()
train(problem, epochs=20)
net, x = problem.network, problem.x
gradkern.prepare(net, x)

# %%
# The same call, the same numbers: in float64, where rounding does not decide on which side of its kink a ReLU is

exact = copy.deepcopy(net).double()
a = captum.attr.IntegratedGradients(exact).attribute(x[:10].double(), target=1)
b = gradkern.attr.IntegratedGradients(exact, engine="kernel").attribute(x[:10].double(), target=1)
print(f"largest difference {float((a - b).abs().max() / a.abs().max()):.0e} of the largest attribution")

# %%
# All classes: a loop over targets, and one call
# ----------------------------------------------


def clock(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


stock = captum.attr.IntegratedGradients(net)
ours = gradkern.attr.IntegratedGradients(net)
x = x[-50:]
loop, expected = clock(
    lambda: torch.stack([stock.attribute(x, target=c, internal_batch_size=256) for c in range(3)], 1)
)
call, maps = clock(lambda: ours.attribute_all(x))  # [50, 3, 1, 251]
print(f"50 signals: Captum, once per class {loop:.2f} s;  attribute_all {call:.2f} s")

# %%
# One signal, attributed to every class

figure = plot.signal(maps[-1], x[-1], names=problem.classes)
