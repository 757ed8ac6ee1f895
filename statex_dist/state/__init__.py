"""The recurrent state: its shape (:mod:`geometry`), its expansion (:mod:`plan`), its training length (:mod:`laws`)."""
