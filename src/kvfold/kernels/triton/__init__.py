"""Triton kernels for CUDA devices: prepare queries, attend to pages, merge; see `decode`."""
