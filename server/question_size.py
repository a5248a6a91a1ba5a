"""How many pool samples a question speaks of, and how many questions are on their way, tuned for each site.

Does not live here: which samples are asked about (server/asking). Answers do not depend on how questions are cut.
"""

from __future__ import annotations

from consilience.server.superlink_process import MOST_BYTES as MOST_CALL_BYTES

STEP = 256
"""Tuned sizes are this times a power of two; only where one answer would grow too large are they a part of it."""
WANTED_SECONDS = 2.0
"""Work of the teacher that a question should make: little is lost with it, and the way there is not felt."""
MOST_SAMPLES = 65_536
MOST_BYTES = 16_000_000


class QuestionSize:
    """The size of one site's next question.

    `fixed` is the job's own size, or None to tune; `row_bytes` the bytes of one answered sample. Each question costs
    round trips, so the first one is small and alone, and the next are as large as its time allows.
    """

    def __init__(self, fixed: int | None, row_bytes: int) -> None:
        self._tuned = fixed is None
        self.known = fixed is not None
        """Whether the size is more than a first guess."""
        self._most = MOST_SAMPLES
        while self._most > 1 and self._most * row_bytes > MOST_BYTES:
            self._most //= 2
        carried = MOST_CALL_BYTES // 2 // row_bytes  # a larger answer would be refused on arrival
        self._pace = 0.0
        self.size = min(STEP, self._most) if fixed is None else max(1, min(fixed, carried))

    def learn(self, samples: int, seconds: float) -> None:
        """Take into account that `samples` samples took the teacher `seconds`: up at once, down by halves."""
        self._pace = seconds / samples
        if not self._tuned:
            return
        self.known = True
        wanted = samples * WANTED_SECONDS / seconds if seconds > 0 else float(MOST_SAMPLES)
        while 2 * self.size <= min(wanted, self._most):
            self.size *= 2
        if wanted <= self.size / 2 and self.size > STEP:
            self.size //= 2

    def at_once(self, most: int, seconds: float) -> int:
        """Return how many questions, at most `most`, may be on their way so that the last is answered in `seconds`."""
        if not self.known:
            return 1
        work = self._pace * self.size
        return max(1, min(most, int(seconds / work))) if work * most > seconds else most

    def end(self, start: int, stop: int) -> int:
        """Return where a question that begins at `start` ends: at the next multiple of the size, or at `stop`."""
        return min(stop, start - start % self.size + self.size)
