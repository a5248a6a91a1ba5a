"""Claim: answering through the whole path is at least 0.90 as fast as a plain torch loop over the same images.

The whole path: questions through Flower's wire encoding to a site, the site's teacher, f16 encoding, the wire back,
validation, and the durable store (fsync and checksum per answer); before an answer leaves, the site keeps it, counts it
in its ledger and signs it. The plain loop: the same network over the same memory-mapped pool in the same batches,
log-softmax, results kept in one array. Both in turn, several times.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.common.data import from_arrays
from consilience.common.identity import make_key
from consilience.common.nets import build, save_model
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import Ask, Preprocessing, SiteSettings, StateDictTeacher
from consilience.common.settings_file import dump_settings
from consilience.deploy.local_grid import LocalGrid
from consilience.server.answers import AnswerStore
from consilience.server.answers_about import About
from consilience.server.asking import ask
from consilience.server.enrolment import at_least, collect_cards
from consilience.server.events import Events
from consilience.server.progress import Progress
from consilience.server.trust import signer_of
from harness import options, show

BATCH = 256


def plain_loop(model: torch.nn.Module, pool: Pool, classes: int) -> float:
    """Return the seconds that a plain loop takes."""
    out = np.empty((len(pool), classes), np.float32)
    began = time.perf_counter()
    with torch.inference_mode():
        for start, images in pool.blocks(BATCH):
            pixels = torch.tensor(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
            logits = model(pixels.mul_(2 / 255).sub_(1))
            out[start : start + len(images)] = torch.log_softmax(logits, dim=1).numpy()
    return time.perf_counter() - began


def whole_path(grid: LocalGrid, pool: Pool, folder: Path) -> float:
    """Return the seconds from the first question to the last stored answer."""
    with Reporter(quiet=True) as reporter:
        cards, _ = collect_cards(grid, "benchmark", lacking=at_least(1), wait=60, strict=True)
        ((node, card),) = cards.items()
        about = About(
            site=card.name,
            pool=pool.digest,
            size=len(pool),
            teacher=card.teacher,
            policy=card.policy,
            encoding="f16",
            classes=len(card.classes),
        )
        store = AnswerStore(folder, about, signer_of(card))
        began = time.perf_counter()
        progress = Progress(folder / "progress.json", "benchmark")
        events = Events(folder / "events.jsonl")
        ask(grid, "benchmark", [(node, store)], Ask(), events=events, reporter=reporter, progress=progress)
        seconds = time.perf_counter() - began
    assert store.complete
    return seconds


def main() -> None:
    arguments = options(__doc__)
    samples, repeats = (2_000, 2) if arguments.quick else (8_192, 5)
    classes, rows, figures = 10, [], {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        pixels = np.random.default_rng(0).integers(0, 256, (samples, 28, 28, 1), np.uint8)
        pool = Pool.build(from_arrays(pixels, None, (), where="benchmark"), home / "pool")
        for architecture in ("cnn3",) if arguments.quick else ("cnn3", "resnet8"):
            model = build(architecture, classes=classes, channels=1, seed=0).eval()
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            save_model(home / architecture / "model.safetensors", model)
            teacher = StateDictTeacher(
                kind="state_dict",
                architecture=architecture,
                path=Path("model.safetensors"),
                classes=tuple(f"class {i}" for i in range(classes)),
                preprocessing=Preprocessing(),
            )
            site = SiteSettings(name="site", teacher=teacher, pools=(pool.folder,), batch_size=BATCH)
            dump_settings(site, home / architecture / "site.yaml")
            make_key(home / architecture / "site.key")
            forget_sites()
            plain, whole = [], []
            with LocalGrid(client_app, [{"site": str(home / architecture / "site.yaml")}], workers=1) as grid:
                whole_path(grid, pool, home / architecture / "warm-up")
                plain_loop(model, pool, classes)
                for repeat in range(repeats):
                    plain.append(plain_loop(model, pool, classes))
                    forget_sites()  # else it would give what it gave before
                    shutil.rmtree(home / architecture / "state")
                    (home / architecture / "state-ledger.head").unlink()
                    whole.append(whole_path(grid, pool, home / architecture / f"store-{repeat}"))
            ratios = [p / w for p, w in zip(plain, whole, strict=True)]
            figures[architecture] = {
                "plain_samples_per_second": samples / statistics.median(plain),
                "whole_samples_per_second": samples / statistics.median(whole),
                "ratio": statistics.median(ratios),
                "ratio_lowest": min(ratios),
                "ratio_highest": max(ratios),
            }
            rows.append((architecture, *figures[architecture].values()))
    columns = ("teacher", "plain loop /s", "whole path /s", "ratio (median)", "lowest", "highest")
    show(f"Answering {samples:,} images of 28x28, {repeats} pairs; bar: 0.90", columns, rows, figures, arguments.json)


if __name__ == "__main__":
    main()
