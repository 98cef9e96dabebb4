"""Accuracy of sparse prefill, measured in pairs: the same prompts through every method and through dense attention.

``python -m compactattn eval --help``; what the tables mean stands in docs/accuracy.md. Needs torch and transformers,
as :mod:`compactattn.hf` does, and numpy.
"""
