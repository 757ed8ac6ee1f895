"""Code that only exports contain; :mod:`checkpoints_tools.export.modeling_code` joins it with the code of our layers.

The modules import torch and transformers. So the offline tools read them as text and never import them. Here they are
written for HGRN2, so that types and style are checked. In an export, the model's own family replaces HGRN2.
"""
