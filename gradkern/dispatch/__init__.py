"""What a call asks for, and which way it goes: kernels, or eager autograd."""
