"""Tests under ``gpu/`` are collected where there is a GPU (``make gpu`` runs them)."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["gpu/*"]
