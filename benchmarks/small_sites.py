"""Sites of small networks, trained in moments: for benchmarks of what becomes of their answers (robust, quality)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from images import Source, read, save, write_pools

from consilience.common.settings import Fit, Policy, SiteSettings, Student, TrainTeacher
from consilience.common.settings_file import dump_settings
from jobs import train_quietly

NETWORK = "cnn3@0.5"


@dataclass(frozen=True)
class Scenario:
    """Whose images, who knows what, how many images a site, or each site, has, and how long networks are trained."""

    data: str
    classes: tuple[tuple[int, ...], ...]
    private: int | tuple[int, ...]
    epochs: int = 8
    pool: int = 3_000
    test: int = 3_000

    @property
    def student(self) -> Student:
        """The student: the teachers' network."""
        return Student(architecture=NETWORK, fit=self._fit)

    @property
    def _fit(self) -> Fit:
        return Fit(epochs=self.epochs, precision="f32")

    def train(self, seed: int, home: Path, folders: Sequence[Path]) -> list[Path]:
        """Make the pool, the test set and the sites' folders in `home`, and train; returns the sites' files."""
        random, every = np.random.default_rng(seed), range(10)
        home.mkdir(parents=True, exist_ok=True)
        images, labels, names = read(self.data, "train", folders)
        source = Source(images, labels, random)
        pool = source.take(every, self.pool)
        order = random.permutation(len(pool[0]))
        counts = (self.private,) * len(self.classes) if isinstance(self.private, int) else self.private
        sites = [source.take(classes, count) for classes, count in zip(self.classes, counts, strict=True)]
        images, labels, _ = read(self.data, "test", folders)
        test = Source(images, labels, random).take(every, self.test)
        write_pools(home, (pool[0][order], pool[1][order]), test, names)
        paths = []
        for k, part in enumerate(sites):
            path = home / f"site-{k + 1}" / "site.yaml"
            settings = SiteSettings(
                name=f"site-{k + 1}",
                data=save(path.parent / "private.npz", part, names),
                teacher=TrainTeacher(kind="train", architecture=NETWORK, fit=self._fit),
                policy=Policy(holdout_accuracy=True),
                pools=(home / "pool",),
                state=path.parent / "state",
                seed=1000 * seed + k,
            )
            dump_settings(settings, path)
            paths.append(path)
        train_quietly(paths)
        return paths
