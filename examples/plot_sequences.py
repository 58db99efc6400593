"""
From one-hot sequences to TF-MoDISco's input
============================================

Synthetic DNA with planted motifs: ``GATTACA`` raises the counts of the model's output, ``TGACTCA`` lowers them.  The
run is the usual one of regulatory genomics: DeepLIFT/SHAP against shuffled references of each sequence, hypothetical
contributions, a store that can be resumed, and the pair of npz files that TF-MoDISco reads.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gradkern
from gradkern import plot
from gradkern.data import to_modisco

torch.manual_seed(0)
LETTERS, LENGTH, MOTIFS = "ACGT", 100, {"GATTACA": 1.0, "TGACTCA": -1.0}


def sequences(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot sequences ``[N, 4, 100]``, and their counts: what was planted in them."""
    letters, counts = torch.randint(4, (count, LENGTH)), torch.zeros(count)
    for i in range(count):
        for k, (motif, effect) in enumerate(MOTIFS.items()):
            if torch.rand(()) < 0.5:
                start = k * LENGTH // 2 + int(torch.randint(LENGTH // 2 - len(motif), ()))
                letters[i, start : start + len(motif)] = torch.tensor([LETTERS.index(a) for a in motif])
                counts[i] += effect
    return nn.functional.one_hot(letters, 4).transpose(1, 2).float(), counts


net = nn.Sequential(
    nn.Conv1d(4, 32, 9, padding=4), nn.ReLU(), nn.Conv1d(32, 32, 3, dilation=2, padding=2), nn.ReLU(),
    nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1),
)  # fmt: skip
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(400):
    x, y = sequences(64)
    optimizer.zero_grad()
    nn.functional.mse_loss(net(x)[:, 0], y).backward()
    optimizer.step()
net.eval()
x, y = sequences(200)
print(f"correlation with what was planted: {float(torch.corrcoef(torch.stack([net(x)[:, 0].detach(), y]))[0, 1]):.2f}")

# %%
# References: twenty shuffles of each sequence, drawn with its own seed.  On real sequences use ``--baselines
# dinucleotide-shuffle`` (tangermeme's, from the extra ``genomics``), which keeps the frequencies of pairs of bases.


def shuffled(inputs: torch.Tensor, n: int, random_state: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random_state)
    return torch.stack([inputs[..., torch.randperm(inputs.shape[-1], generator=generator)] for _ in range(n)], 1)


folder = Path(tempfile.mkdtemp())
store = gradkern.run(
    net, x, folder / "contributions.zarr", "deep_lift_shap", progress=False,
    arguments={"baselines": shuffled, "n_references": 20, "hypothetical": True},
)  # fmt: skip
names = [f"synthetic{i}:0-{LENGTH}" for i in range(len(x))]
files = to_modisco(store, x, folder / "modisco", names=names)
print([file.name for file in files])

# %%
# The contributions of one sequence that has both motifs: hypothetical ones times the sequence

letters, maps = (np.load(file)["arr_0"] for file in files)
there = maps * letters  # [N, 4, length]
both = int(((y.numpy() == 0) & (np.abs(there).max((1, 2)) > 0.2)).nonzero()[0][0])
figure = plot.logo(there[both : both + 1], names=["contributions"])

# %%
# Motifs found: the windows that contribute most, aligned at their largest sum and averaged over all sequences.
# (TF-MoDISco does this properly: ``modisco motifs -s sequences.npz -a contributions.npz``.)


def found(sign: float, width: int = 7) -> np.ndarray:
    """The mean contributions ``[4, width]`` of the strongest window of the 50 sequences that have the strongest."""
    sums = np.lib.stride_tricks.sliding_window_view(sign * there.sum(1), width, axis=1).sum(2)  # [N, places]
    best = np.argsort(-sums.max(1))[:50]
    return np.mean([there[i, :, (a := int(sums[i].argmax())) : a + width] for i in best], axis=0)


figure = plot.logo(np.stack([found(1.0), found(-1.0)]), names=list(MOTIFS))
