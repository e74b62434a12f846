"""Optimizations, one file each. A new one is one new file here, or an entry point of another package."""
