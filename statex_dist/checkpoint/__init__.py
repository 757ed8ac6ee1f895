"""Where a run's checkpoints lie (:mod:`layout`) and what proves that one is whole (:mod:`manifest`)."""
