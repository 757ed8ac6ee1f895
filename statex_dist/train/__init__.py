"""Training: the loop, its metrics and its signals. The loop knows an engine and a loader, nothing else."""
