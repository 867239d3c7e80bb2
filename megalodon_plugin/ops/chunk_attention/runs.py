"""Where the chunks of a row lie: a run of whole chunks, then a short last one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Consecutive chunks of one length in every row: `n_chunks` of `chunk` positions from `start` on."""

    start: int
    n_chunks: int
    chunk: int

    @property
    def stop(self) -> int:
        return self.start + self.n_chunks * self.chunk


def runs(length: int, chunk_size: int) -> list[Run]:
    """The whole chunks and the short last one of a row of `length` >= 1, as far as there are such."""
    n_whole, rest = divmod(length, chunk_size)
    found = [Run(0, n_whole, chunk_size), Run(length - rest, 1, rest)]
    return [run for run in found if run.n_chunks * run.chunk > 0]
