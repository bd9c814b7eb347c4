"""Parts of the benchmark ``wormholes``: tasks, training, measurement, report."""
