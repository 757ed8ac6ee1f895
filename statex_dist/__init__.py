"""statex-dist: a larger state for pre-trained recurrent language models, at any scale.

This package is the library. The offline tools are in ``checkpoints_tools``, the entry points in ``launch``.
``docs/architecture.md`` describes the layers of packages and lists which module may import which.
"""

__version__ = "0.1.0"
