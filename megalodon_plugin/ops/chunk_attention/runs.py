"""Where the chunks of a row lie: a stretch of whole ones and a short last one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stretch:
    """Consecutive chunks of one length in every row: `n_chunks` of `chunk` positions from `start` on."""

    start: int
    n_chunks: int
    chunk: int

    @property
    def stop(self) -> int:
        return self.start + self.n_chunks * self.chunk


def stretches(length: int, chunk_size: int) -> list[Stretch]:
    """The whole chunks and the short last one of a row of `length` >= 1, as far as there are such."""
    n_whole, rest = divmod(length, chunk_size)
    found = [Stretch(0, n_whole, chunk_size), Stretch(length - rest, 1, rest)]
    return [stretch for stretch in found if stretch.n_chunks * stretch.chunk > 0]
