"""Two ways to copy: the faster is used, both are looked at, and neither may lose a copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from rollout_wal.dataset.copy_choice import CopyChoice


@dataclass
class Machine:
    """Seconds that each way takes, and what was copied how."""

    takes: list[float]
    can: bool = True
    now: float = 0.0
    ways: list[int] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def copy(self, choice: CopyChoice, times: int) -> list[int]:
        """The ways of this many copies, one for each."""
        self.ways.clear()
        for _ in range(times):
            choice.copy(1 << 20, self.first, self.second)
        return list(self.ways)

    def first(self) -> None:
        self.now += self.takes[0]
        self.ways.append(0)

    def second(self) -> bool:
        self.now += self.takes[1]
        if self.can:
            self.ways.append(1)
        return self.can


@pytest.mark.parametrize("takes", [[1.0, 2.0], [2.0, 1.0]])
def test_the_faster_way_is_used_and_a_change_is_noticed(takes: list[float]) -> None:
    machine = Machine(takes)
    choice = CopyChoice(machine.clock)
    faster = takes.index(min(takes))
    assert set(machine.copy(choice, 20)) == {0, 1}
    later = machine.copy(choice, 640)
    assert later.count(1 - faster) == 10  # now and then, in case it is the faster one now
    machine.takes.reverse()
    machine.copy(choice, 640)
    assert machine.copy(choice, 640).count(faster) == 10


def test_a_slow_spell_does_not_decide() -> None:
    machine = Machine([1.0, 2.0])
    choice = CopyChoice(machine.clock)
    machine.copy(choice, 16)
    machine.takes[0] = 1000.0
    machine.copy(choice, 2)
    machine.takes[0] = 1.0
    assert machine.copy(choice, 64).count(0) >= 62


def test_what_the_second_way_cannot_do_the_first_does() -> None:
    machine = Machine([5.0, 1.0], can=False)
    choice = CopyChoice(machine.clock)
    assert machine.copy(choice, 640) == [0] * 640
    assert machine.now < 640 * 5.0 + 30  # and it is hardly tried any more


def test_an_error_of_the_first_way_is_the_callers() -> None:
    def fail() -> None:
        raise OSError("gone")

    choice = CopyChoice()
    for _ in range(20):
        with pytest.raises(OSError, match="gone"):
            choice.copy(1, fail, lambda: False)
