"""Prepares the images of a table for training: splits, 8-bit images of deeper ones, class folders."""
