"""
Which pixels speak for which digit
==================================

LeNet-5 has ten outputs and 28 × 28 inputs: a Jacobian of 10 × 784 numbers for every image.  Here it is, for all 1,797
handwritten digits of scikit-learn (enlarged from 8 × 8), and compared with the loop that most people write.
"""

import time

import torch
from demo import digits, train

import gradkern
from gradkern import plot

torch.manual_seed(0)
problem = digits()
accuracy = train(problem, epochs=problem.epochs)
net, x = problem.network, problem.x
print(f"accuracy on the test part {accuracy:.1%}")

# %%
# One image: ten maps
# -------------------
# `prepare` captures the network, compares it with autograd on these samples, and plans the kernels.  Without it, that
# happens as soon as it would save time.

jacobian = gradkern.prepare(net, x)
one = x[-1:]
J = jacobian(one)  # [1, 10, 1, 28, 28]
print(tuple(J.shape), "predicted:", int(net(one).argmax()))
figure = plot.image(J[0], one[0], names=problem.classes)

# %%
# All images
# ----------

start = time.perf_counter()
J = gradkern.jacobian(net, x)  # [1797, 10, 1, 28, 28]
ours = time.perf_counter() - start
print(f"gradkern: {len(x) / ours:,.0f} images/s, all ten classes")

# %%
# The usual loop goes one image at a time through torch's own Jacobian; twenty images are enough to see its rate.

start = time.perf_counter()
rows = [torch.autograd.functional.jacobian(net, image)[0, :, 0] for image in x[:20].split(1)]  # each [10, 1, 28, 28]
loop = time.perf_counter() - start
difference = (torch.stack(rows) - J[:20]).abs().flatten(1).amax(1) / J[:20].abs().flatten(1).amax(1)  # [20]
print(
    f"loop:     {20 / loop:,.0f} images/s;  median difference {float(difference.median()):.0e} of the largest gradient"
)

# %%
# Where each class is sensitive over the whole data set
# -----------------------------------------------------
# The mean magnitude of the gradient, times the standard deviation of the pixel: a pixel that never carries ink cannot
# matter, whatever its gradient.

figure = plot.image(J.abs().mean(0) * x.std(0), x.mean(0), names=problem.classes)

# %%
# The same as one picture, outputs against features, as one would draw it for 900 classes:

figure = plot.matrix(J.abs().mean(0) * x.std(0), names=problem.classes)
