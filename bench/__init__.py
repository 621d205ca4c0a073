"""Benchmarks: questions about speed, asked of the service over its port and of rivals in the same run."""
