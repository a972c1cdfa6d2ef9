"""The processes that share the work of one evaluation."""


class Team:
    """One process alone. A team of several has the same four members, see `trainers/runs/rounds.py`."""

    rank, size = 0, 1

    def share(self, count: int) -> range:
        """Which of `count` samples this process draws and scores; every one falls to exactly one process."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, part) -> list:
        """The part of every process, in order of rank, on every process."""
        return [part]


ALONE = Team()
