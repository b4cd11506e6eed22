"""The main loop, the step and evaluation."""
