"""What ``launch/supervise.py`` is made of."""
