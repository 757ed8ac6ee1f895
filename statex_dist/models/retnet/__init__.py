"""RetNet (arXiv 2307.08621): retention, linear attention with a fixed decay per head and rotary positions."""
