"""Running plans: compiled ops, the executor, live parameters, the plain reference."""
