"""The parts of the benchmark ``models``."""
