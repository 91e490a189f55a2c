"""Checkpoints on disk: reading, loading with online quantization, writing."""
