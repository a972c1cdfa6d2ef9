"""The table of bad inputs (`python tests/bad_input.py`), room by room."""

import bad_input
import pytest


@pytest.mark.parametrize("room", bad_input.ROOMS)
def test_every_bad_input_ends_in_one_line(room):
    ((_, faults),) = bad_input.check([room]).values()
    assert faults == {}


def test_the_table_holds_at_least_400_cases(tmp_path):
    world = bad_input.World(tmp_path / "good")
    assert sum(len(cases_of(world)) for cases_of in bad_input.ROOMS.values()) >= 400
