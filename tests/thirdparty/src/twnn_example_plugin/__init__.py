"""A solver and a policy from outside: `aitken` and `even_rows`."""
