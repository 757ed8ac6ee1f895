"""What a recurrent state is (:mod:`geometry`) and how it is to grow (:mod:`plan`)."""
