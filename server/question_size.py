"""How many pool samples a question speaks of, tuned for each site.

Does not live here: which samples are asked about (server/asking). Answers do not depend on how questions are cut.
"""

from __future__ import annotations

from consilience.server.superlink_process import MOST_BYTES as MOST_CALL_BYTES

STEP = 256
"""Tuned sizes are this times a power of two; only where one answer would grow too large are they a part of it."""
FIRST = 2 * STEP
WANTED_SECONDS = 2.0
"""Work of the teacher that a question should make: little is lost with it, and the way there is not felt."""
GROWTH = 32
"""A question speaks of at most this many times the samples of an answer that has come: each costs round trips."""
MOST_SAMPLES = 65_536
MOST_BYTES = 16_000_000


class QuestionSize:
    """The size of one site's next question about one pool.

    `fixed` is the job's own size, or None to tune. `samples` is the pool's size, `row_bytes` the bytes of one
    answered sample, `in_flight` how many questions are on their way at a time.
    """

    def __init__(self, fixed: int | None, samples: int, row_bytes: int, in_flight: int) -> None:
        self._tuned = fixed is None
        if fixed is not None:
            self.size = max(1, min(fixed, MOST_CALL_BYTES // 2 // row_bytes))  # more would be refused on arrival
            return
        self._most = MOST_SAMPLES
        while self._most > 1 and self._most * row_bytes > MOST_BYTES:
            self._most //= 2
        # A small pool is cut so that every question that may be on its way has samples to ask about.
        self.size = min(FIRST if samples >= FIRST * in_flight else STEP, self._most)

    def learn(self, samples: int, seconds: float) -> None:
        """Take into account that `samples` samples took the teacher `seconds`.

        The first answers may be slow for other reasons (a pool is opened, a model warms up), and a short one says
        little: `GROWTH` bounds a step up, and a step down halves.
        """
        if not self._tuned:
            return
        wanted = samples * WANTED_SECONDS / seconds if seconds > 0 else float(MOST_SAMPLES)
        grown = self.size
        while 2 * grown <= min(wanted, self._most, GROWTH * samples):
            grown *= 2
        if grown > self.size:
            self.size = grown
        elif wanted <= self.size / 2 and self.size > STEP:
            self.size //= 2

    def end(self, start: int, stop: int) -> int:
        """Return where a question that begins at `start` ends: at the next multiple of the size, or at `stop`."""
        return min(stop, start - start % self.size + self.size)
