"""What a call asks for, and how it is run: on kernels, or by eager autograd."""
