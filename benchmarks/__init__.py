"""Benchmarks: every table of the documentation is one command, and its runs are committed as data."""
