"""Reads the request of a call, and runs it on kernels or by eager autograd."""
