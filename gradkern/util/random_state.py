"""Saves and restores torch's random generators: the CPU's and those of every CUDA device in use."""

from __future__ import annotations

import torch


class RandomState:
    """The states of the generators at construction."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @property
    def changed(self) -> bool:
        """Whether random numbers have been drawn since."""
        now = RandomState()
        before = [self.cpu, *self.cuda]
        return not all(torch.equal(a, b) for a, b in zip(before, [now.cpu, *now.cuda], strict=False))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
