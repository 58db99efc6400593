"""Decides how each step of a Program runs."""
