"""Adaptive depth over many processes: recorded step counts, and a simulation of what they cost."""
