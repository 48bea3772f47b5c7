"""Kernels as CUDA: their text, what a GPU's compiler makes of it, and how they are launched."""
