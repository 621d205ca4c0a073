"""Benchmarks: questions about speed, asked of the service over its port and of its rivals in the same run."""
