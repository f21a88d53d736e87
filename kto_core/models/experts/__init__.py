"""Mixtures of experts in 4 bits: how experts are held, multiplied with, and read from a checkpoint."""

CHUNK_BYTES = 128 * 2**20  # of experts out of their 4 bits at a time, on a GPU
