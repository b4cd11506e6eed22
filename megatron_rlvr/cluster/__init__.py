"""Jobs on a Slurm cluster: what is asked of it, the script that asks, and the commands that send and follow it."""
