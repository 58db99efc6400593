"""
Motifs in one-hot sequences
===========================

Synthetic DNA with planted motifs: class 1 has ``GATTACA`` somewhere, class 2 has ``TGACTCA``, class 0 has neither.  A
small convolutional network learns to tell them apart, and DeepLift against a uniform reference shows what it looks at.
"""

import torch
from torch import nn

import gradkern.attr
from gradkern import plot

torch.manual_seed(0)
LETTERS, LENGTH, MOTIFS = "ACGT", 60, ("", "GATTACA", "TGACTCA")


def sequences(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot sequences ``[N, 4, 60]`` and their classes."""
    letters, classes = torch.randint(4, (count, LENGTH)), torch.randint(3, (count,))
    for i, motif in enumerate(MOTIFS[c] for c in classes.tolist()):
        start = int(torch.randint(LENGTH - 7, ()))
        letters[i, start : start + len(motif)] = torch.tensor([LETTERS.index(a) for a in motif], dtype=torch.long)
    return nn.functional.one_hot(letters, 4).transpose(1, 2).float(), classes


net = nn.Sequential(
    nn.Conv1d(4, 32, 9, padding=4), nn.ReLU(), nn.Conv1d(32, 32, 5, padding=2), nn.ReLU(),
    nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 3),
)  # fmt: skip
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(300):
    x, y = sequences(128)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
net.eval()
x, y = sequences(500)
print(f"accuracy {(net(x).argmax(1) == y).double().mean():.1%}")

# %%
# Contributions of all three classes, against a reference that has a quarter of every letter everywhere

maps = gradkern.attr.DeepLift(net).attribute_all(x, baselines=torch.full_like(x[:1], 0.25))  # [500, 3, 4, 60]


def explained(c: int):
    """The logos of the first sequence of class ``c``, one per output."""
    i = int((y == c).nonzero()[0])
    return plot.logo(maps[i] * x[i], names=["no motif", *MOTIFS[1:]])


figure = explained(1)

# %%
# and of a sequence with the other motif:

figure = explained(2)

# %%
# Contributions add up to the change of the output:

change = (net(x) - net(torch.full_like(x[:1], 0.25))).detach()  # [500, 3]
print(f"largest error of the sum {float((maps.sum((2, 3)) - change).abs().max()):.0e}")
