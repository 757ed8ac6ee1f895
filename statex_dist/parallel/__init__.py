"""Where this process stands among the others."""
