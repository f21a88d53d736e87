"""Mixtures of experts in 4 bits: how experts are held, multiplied with, and read from a checkpoint."""
