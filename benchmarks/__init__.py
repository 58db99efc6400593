"""Benchmarks: all-class input gradients by gradkern and by everything that torch and Captum offer.

``python -m benchmarks --help`` and ``python -m benchmarks.full_set --help``.
"""
