"""Live view, metric sinks and the HTML report."""
