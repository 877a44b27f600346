"""Prepares RadImageNet for training."""
