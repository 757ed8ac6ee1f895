"""statex-dist: a bigger memory for pre-trained recurrent language models, at any scale.

The library half of the project; the offline tools live in ``checkpoints_tools`` and every entry point in ``launch``.
``docs/architecture.md`` draws the floors of the house and says which module may import which.
"""

__version__ = "0.1.0"
