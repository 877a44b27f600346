"""Checks a set of images for duplicates, leaks, and blank or unreadable images."""
