"""Functions of other packages with gradkern's engine under them: the same arguments, the same results."""
