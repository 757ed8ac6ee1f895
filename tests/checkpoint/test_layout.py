"""Names of tags: as they are saved, and resharded."""

from pathlib import Path

import pytest

from statex_dist.checkpoint.layout import complete_tags, ranks_of, step_of, tag_of


@pytest.mark.parametrize(
    ("tag", "step", "ranks"),
    [
        ("global_step0", 0, None),
        ("global_step100", 100, None),
        ("global_step100-ranks2", 100, 2),
        ("global_step100-ranks12", 100, 12),
        ("global_step100-ranks0", None, None),
        ("global_step100-ranks", None, None),
        ("global_step100-ranks2-ranks3", None, None),
        ("global_step100\n", None, None),
        ("global_step", None, None),
        ("global_step٣", None, None),
        (".tmp-global_step100-ranks2", None, None),
        ("latest", None, None),
    ],
)
def test_a_tag_says_its_step_and_ranks(tag: str, step: int | None, ranks: int | None):
    assert (step_of(tag), ranks_of(tag)) == (step, ranks)
    if step is not None:
        assert tag_of(step, ranks) == tag


def test_resharded_copies_come_before_their_original(tmp_path: Path):
    tags = ["global_step9", "global_step10", "global_step10-ranks2", "global_step10-ranks12", "global_step9-ranks3"]
    for tag in tags:
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "MANIFEST.json").touch()
    (tmp_path / "global_step11-ranks2").mkdir()  # not complete
    (tmp_path / ".tmp-global_step12-ranks2").mkdir()
    assert complete_tags(tmp_path) == [
        *("global_step10-ranks12", "global_step10-ranks2", "global_step10"),
        *("global_step9-ranks3", "global_step9"),
    ]
