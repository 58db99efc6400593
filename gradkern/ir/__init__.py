"""The Program: a network as immutable data, and analyses that do not run it."""
