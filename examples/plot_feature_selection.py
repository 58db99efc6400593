"""
Which points of a signal matter, and is the ranking worth anything
==================================================================

A 1-D CNN on ArrowHead (outlines of projectile points, 251 numbers each, 3 classes; the data come with sktime).
`gradkern.importance` ranks the features over the whole data set, gives bootstrap intervals, and tests the ranking:
features are deleted in its order, and in random order, and the drop of the class score is compared.
"""

import torch
from demo import arrow_heads, train

import gradkern
from gradkern import plot
from gradkern.report import datafigures

torch.manual_seed(0)
problem = arrow_heads()
accuracy = train(problem, epochs=60)
net, x = problem.network, problem.x
print(f"accuracy on the test part {accuracy:.1%}")

# %%
# The gradient of all classes at every point of one signal

J = gradkern.jacobian(net, x[-1:])  # [1, 3, 1, 251]
figure = plot.signal(J[0], x[-1], names=problem.classes)

# %%
# The ranking over the data set
# -----------------------------

ranking = gradkern.importance(net, x, names=problem.classes)
print(ranking)

# %%
# The mean importance behind the mean signal:

figure = plot.signal(ranking.scores, x.mean(0), names=problem.classes)

# %%
# Does deleting the features at the top hurt more than deleting any others?  The area between the two lines says so.

figure = datafigures.curves(ranking.curve)

# %%
# Feature selection: keep the best fifth, replace the rest by their mean, and look at the accuracy
# ------------------------------------------------------------------------------------------------

keep = torch.as_tensor(ranking.select(51))  # [1, 251]: the points that matter most to any class
chance = torch.zeros_like(keep)
chance[0, torch.randperm(251)[:51]] = True


def accuracy_with(kept: torch.Tensor) -> float:
    masked = torch.where(kept, problem.test_x, problem.train_x.mean(0))
    with torch.no_grad():
        return (net(masked).argmax(1) == problem.test_y).double().mean().item()


print(f"all 251 points {accuracy:.1%};  the best 51 {accuracy_with(keep):.1%};  any 51 {accuracy_with(chance):.1%}")
