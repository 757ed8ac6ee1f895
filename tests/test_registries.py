"""A name that is taken is refused by every registry; ``python -O`` removes asserts, so none may rest on one."""

from typing import Any

import pytest

from statex_dist.checkpoint.formats.registry import add_layout, layouts
from statex_dist.data.packing.pieces import concatenate
from statex_dist.data.packing.registry import PackingStrategy
from statex_dist.data.packing.registry import register as register_packing
from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites.registry import find_suite
from statex_dist.evaluation.suites.registry import register as register_suite
from statex_dist.models.mitigation import MITIGATIONS
from statex_dist.models.mitigation import register as register_mitigation
from statex_dist.models.registry import family_of
from statex_dist.models.registry import register as register_family
from statex_dist.optim.groups import OPTIMIZERS


@pytest.mark.parametrize(
    ("register", "taken"),
    [
        (register_family, family_of("gla")),
        (add_layout, layouts()[0]),
        (register_mitigation, next(iter(MITIGATIONS.values()))),
        (register_packing, PackingStrategy(name="best_fit", lay_out=concatenate)),
        (register_suite, find_suite("recall")),
        (lambda part: OPTIMIZERS.register("adamw", part), object()),
    ],
    ids=["family", "layout", "mitigation", "packing", "suite", "optimizer"],
)
def test_a_name_that_is_taken_is_refused(register: Any, taken: Any):
    with pytest.raises(ConfigError):
        register(taken)
