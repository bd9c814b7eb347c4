"""The parts of the benchmark ``profile``."""
