"""Methods against each other on one task: a matrix of runs, and one page that tells what differed."""
