"""Weights and full states as files, and the checks of files that are not trusted."""
