"""Files that survive a kill: atomic writes, locks, JSONL journals; and the progress of long jobs (standard library)."""
