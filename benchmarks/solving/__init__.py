"""Problems, references and candidates that the benchmarks ``solvers``, ``backward`` and ``gpu`` share."""
