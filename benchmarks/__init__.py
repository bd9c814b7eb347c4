"""``python -m benchmarks NAME``: one benchmark for each question; results are dated folders."""
