"""Mitigations of state collapse, one file each; :mod:`statex_dist.models.mitigation` registers them."""
