"""The parts of the benchmark ``sequences``."""
