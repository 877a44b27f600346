"""Checkpoint and weight files, and the checks of files that are not trusted."""
