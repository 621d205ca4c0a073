"""Models: where a model comes from. Turns what the operator named into a folder of standard files.

Knows files and formats; knows nothing of gRPC, of requests, or of how a model is run.
"""
