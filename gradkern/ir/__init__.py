"""The Program: what a network computes, as immutable data, and what can be said about it without running it."""
