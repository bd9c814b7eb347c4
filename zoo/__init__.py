"""Models, data and the ``twnn`` command built on :mod:`twnn_plugin`."""
