"""Entry points: the training script, the ``statex`` command line and the cluster launch files."""
