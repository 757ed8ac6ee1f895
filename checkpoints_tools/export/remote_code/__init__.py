"""The parts of ``modeling_statex.py`` of an export (:mod:`checkpoints_tools.export.modeling_code`).

They import torch and transformers, so the offline tools read them as text and never import them. Types and style are
checked here, where they are modules; an export holds those that its family needs, without their imports of each other.
"""
