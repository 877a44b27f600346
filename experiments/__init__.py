"""Experiments: plans of runs, their execution and their analysis."""
