"""Rewritings of a Program: Program in, Program out."""
