"""Lowers a group of steps to kernel records and packed weights."""
