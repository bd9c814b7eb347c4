"""The parts of the benchmark ``memory``."""
