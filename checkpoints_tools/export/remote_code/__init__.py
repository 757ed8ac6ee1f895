"""What an export has beside our own layers, which :mod:`checkpoints_tools.export.modeling_code` puts together with it.

The modules import torch and transformers, so the offline tools read them as text and never import them. Here they are
written for HGRN2, so that types and style are checked; in an export another family takes its place.
"""
