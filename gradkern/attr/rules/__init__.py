"""Methods that put a rule in place of each step's derivative."""
