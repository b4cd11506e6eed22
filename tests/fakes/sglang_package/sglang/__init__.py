"""A stand-in for the sglang package on PYTHONPATH: the launcher runs it as it runs the real one, in a second."""
