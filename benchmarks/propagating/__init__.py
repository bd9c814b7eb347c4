"""The work of ``propagation``: the poster's experiments, deep networks on points in the plane, reports."""
