"""Shared by the tests; holds no test itself."""
