"""Passes that take a Program and return a rewritten Program."""
