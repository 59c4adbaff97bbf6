"""Attention on packed codes, for CPUs and GPUs; kernels answer to `kvfold.attention.oracle`."""
