"""Training by noisy gradients: what opacus did is what the event says, and it is the site's secret how."""

from __future__ import annotations

import cmath
import hmac
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from safetensors.torch import load_file
from scipy.stats import kstest, norm
from torch import nn

from consilience.client.privacy import account, answering_costs, load_private, train_private
from consilience.client.privacy.dp_draws import STEPS, blurred, poisson
from consilience.client.privacy.dp_sgd import GROUPS, dp_record, grouped, train_dp
from consilience.client.privacy.events import DpSgdTraining, sampling
from consilience.client.privacy.noise import Secret, Stream, load_secret
from consilience.client.teacher import describe_teacher, load_teacher
from consilience.common.epochs import EpochRecord
from consilience.common.errors import MissingExtraError, TeacherError
from consilience.common.nets import build
from consilience.common.nets.architectures import ARCHITECTURES
from consilience.common.seeds import derive
from consilience.common.settings import DpSgd, Fit, SiteSettings
from helpers.private_site import Make, bars, settings_of, write_data

NOISY: dict[str, Any] = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "clip": 0.7}
SHORT = {"epochs": 2, "batch_size": 8}


class Watched:
    """What opacus was asked to do, and did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # here: it takes seconds, of every worker that collects
        from opacus.accountants import RDPAccountant
        from opacus.optimizers import DPOptimizer

        self.optimizers: list[Any] = []
        self.sums: list[float] = []
        self.taken: list[list[int]] = []
        self.noise: list[np.ndarray] = []
        self.samplers: list[tuple[int, float, int]] = []
        self.accountant = RDPAccountant()
        watched = self

        class Optimizer(DPOptimizer):
            def __init__(self, *given: Any, **named: Any) -> None:
                super().__init__(*given, **named)
                watched.optimizers.append(self)

            def clip_and_accumulate(self) -> None:
                assert len(watched.taken[-1]) == len(self.grad_samples[0])
                super().clip_and_accumulate()
                flat = torch.cat([vars(parameter)["summed_grad"].flatten() for parameter in self.params])
                watched.sums.append(float(flat.norm()))

            def scale_grad(self) -> None:
                noise = [(p.grad - vars(p)["summed_grad"]).flatten() for p in self.params]
                watched.noise.append(torch.cat(noise).numpy())
                super().scale_grad()

            def step(self, closure: Any = None) -> Any:
                _, rate, _ = watched.samplers[-1]
                watched.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=rate)
                return super().step(closure)

        def sampler(records: int, rate: float, steps: int, stream: Stream) -> Iterator[torch.Tensor]:
            watched.samplers.append((records, rate, steps))
            for ids in poisson(records, rate, steps, stream):
                watched.taken.append(ids.tolist())
                yield ids

        monkeypatch.setattr("opacus.optimizers.DPOptimizer", Optimizer)
        monkeypatch.setattr("consilience.client.privacy.dp_sgd.poisson", sampler)

    @property
    def sizes(self) -> list[int]:
        return [len(ids) for ids in self.taken]


def private(settings: SiteSettings) -> DpSgd:
    assert isinstance(settings.privacy, DpSgd)
    return settings.privacy


def test_it_samples_cuts_and_blurs_as_the_accountant_believes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    settings = make(NOISY, fit=SHORT | {"epochs": 8})
    record = train_dp(settings, private(settings))
    (optimizer,), (sampled,) = watched.optimizers, watched.samplers
    n, event = record.train_count, record.event
    assert record.holdout_count == 120 - n
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.loss_reduction) == (1.0, 0.7, "mean")
    assert optimizer.expected_batch_size == 8
    assert sampled == (n, 8 / n, event.steps)
    # each record by itself: the sizes of batches spread as a binomial's
    sizes = np.array(watched.sizes)
    assert len(sizes) == event.steps == 8 * round(n / 8)
    assert sizes.mean() == pytest.approx(8, abs=4 * np.sqrt(8 / len(sizes)))
    assert sizes.var() == pytest.approx(8 * (1 - 8 / n), rel=0.35)
    # no sum is longer than as many gradients of length `clip`, and none of them is unless cut
    assert all(total <= size * 0.7 + 1e-4 for total, size in zip(watched.sums, sizes, strict=True))
    assert max(watched.sums) > 1
    assert event == DpSgdTraining(noise_multiplier=1.0, sample_rate=8 / n, steps=len(sizes), run=record.model_digest)
    ((noise, rate, steps),) = watched.accountant.history
    assert (noise, rate, steps) == (event.noise_multiplier, event.sample_rate, event.steps)
    spent = account(answering_costs(settings, 10**6), 1e-5)
    assert spent.unit == "record"
    orders: list[float | int] = list(range(2, 64))
    assert spent.rdp == pytest.approx(watched.accountant.get_privacy_spent(delta=1e-5, alphas=orders)[0], rel=1e-6)


def test_it_learns_and_answers_like_any_teacher(make: Make) -> None:
    settings = make({**NOISY, "noise_multiplier": 0.05}, fit={"epochs": 10, "learning_rate": 0.2})
    epochs: list[EpochRecord] = []
    train_private(settings, epochs.append)
    assert [epoch.epoch for epoch in epochs] == list(range(10))
    assert epochs[-1].loss < epochs[0].loss
    images, labels = bars(60, seed=9)
    teacher = load_teacher(settings)
    rows = teacher.log_probs(images)
    assert np.mean(rows.argmax(axis=1) == labels) > 0.7
    assert dp_record(settings, private(settings)).holdout_accuracy is not None
    assert describe_teacher(settings) == ("trained cnn3; dp-sgd: protects a record; noise multiplier 0.05", None)
    train_private(settings, epochs.append)
    assert len(epochs) == 10  # it was there
    np.testing.assert_array_equal(load_teacher(settings).log_probs(images), rows)


def test_a_training_is_its_secret_s(tmp_path: Path) -> None:
    write_data(tmp_path, *bars(120))
    settings = settings_of(tmp_path, NOISY, fit=SHORT)
    place = settings.state / "privacy" / "dp-sgd"

    def digest(changed: SiteSettings = settings) -> str:
        shutil.rmtree(place, ignore_errors=True)
        return train_dp(changed, private(changed)).model_digest

    first = digest()
    assert digest() == first  # begun anew under the same secret, the same comes out
    images, labels = bars(120)
    images[7, 0, 0, 0] ^= 1
    write_data(tmp_path, images, labels)
    assert digest() != first
    write_data(tmp_path, *bars(120))
    (settings.state / "privacy" / "noise.key").unlink()
    assert digest() != first


def test_other_data_have_other_noise_and_other_samples(make: Make, tmp_path: Path) -> None:
    settings = make(NOISY, fit={"epochs": 1, "batch_size": 64})
    images, labels = bars(120)
    images[7, 0, 0, 0] ^= 1
    drawn = set()
    for data in (bars(120), (images, labels), (bars(120)[0], np.roll(labels, 3))):
        write_data(tmp_path, *data)
        with pytest.MonkeyPatch.context() as patch:
            watched = Watched(patch)
            train_dp(settings, private(settings))
        drawn |= {watched.noise[0].tobytes(), str(watched.taken)}
    assert len(drawn) == 4  # labels that are rolled by a class's worth are the same labels


def cipher(key: bytes, purpose: list[str]) -> Callable[[int], list[int]]:
    """Words of 64 bits by the definition: AES-256 in counter mode, whose key is HMAC-SHA256 of the purpose."""
    text = json.dumps(purpose, separators=(",", ":")).encode()
    stream = Cipher(algorithms.AES256(hmac.digest(key, b"stream\0" + text, "sha256")), modes.CTR(bytes(16)))
    encryptor = stream.encryptor()
    return lambda count: [word for (word,) in struct.iter_unpack("<Q", encryptor.update(bytes(8 * count)))]


def test_noise_and_samples_are_of_the_secret_s_full_strength(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    settings = make(NOISY, fit={"epochs": 1, "batch_size": 32})
    torch.manual_seed(1)
    record = train_dp(settings, private(settings))
    purpose = ["dp-sgd", record.settings_digest, record.data_digest]
    words = cipher(load_secret(settings).key, [*purpose, "samples"])
    n = record.train_count
    for ids in watched.taken:
        assert ids == [k for k, word in enumerate(words(n)) if (word >> 11) / 2**53 < 32 / n]
    words = cipher(load_secret(settings).key, [*purpose, "noise"])
    for noise in watched.noise:
        expected: list[float] = []
        for parameter in watched.optimizers[0].params:
            half = (parameter.numel() + 1) // 2
            uniform = [((word >> 11) + 0.5) / 2**53 for word in words(2 * half)]
            turns = list(zip(uniform[:half], uniform[half:], strict=True))
            pairs = [cmath.rect(math.sqrt(-2 * math.log(r)), 2 * math.pi * turn) for r, turn in turns]
            both = [pair.real for pair in pairs] + [pair.imag for pair in pairs]
            expected += both[: parameter.numel()]
        np.testing.assert_allclose(noise, 0.7 * np.array(expected), atol=1e-5)
    # nothing hangs on torch's own numbers, of which a CPU has 2^32 rows
    shutil.rmtree(settings.state / "privacy" / "dp-sgd")
    torch.manual_seed(2)
    assert train_dp(settings, private(settings)).model_digest == record.model_digest


def test_noise_is_gaussian_new_in_each_step_and_on_a_grid(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    settings = make({**NOISY, "noise_multiplier": 3.0}, fit={"epochs": 2, "batch_size": 16})
    train_dp(settings, private(settings))
    steps = np.stack(watched.noise) / 2.1
    assert np.abs(np.corrcoef(steps) - np.eye(len(steps))).max() < 6 / np.sqrt(steps.shape[1])
    noise = steps.ravel()
    some = noise[:: len(noise) // 20_000][:20_000]
    assert kstest(some, "norm").pvalue > 1e-3
    pairs = noise[:20_000].reshape(-1, 2).sum(axis=1)  # neighbours know nothing of one another
    assert kstest(pairs, norm(scale=math.sqrt(2)).cdf).pvalue > 1e-3
    total = torch.linspace(-3, 3, 10_001)
    found = blurred(total, 2.1, load_secret(settings).stream("a"))
    grid = found.double().numpy() / (2 * STEPS)
    assert np.array_equal(grid, np.rint(grid))


def test_a_record_is_taken_with_its_chance_whoever_else_is() -> None:
    stream = Secret(b"k" * 32).stream("samples")
    taken = np.zeros((2000, 50))
    for step, ids in enumerate(poisson(50, 0.3, 2000, stream)):
        taken[step, ids.numpy()] = 1
    assert np.abs(taken.mean(axis=0) - 0.3).max() < 5 * np.sqrt(0.21 / 2000)
    apart = np.corrcoef(taken.T) - np.eye(50)
    assert np.abs(apart).max() < 5.5 / np.sqrt(2000)
    assert [ids.tolist() for ids in poisson(4, 1.0, 2, stream)] == [[0, 1, 2, 3]] * 2


def test_one_record_fewer_changes_nothing_of_who_is_held_out(make: Make, tmp_path: Path) -> None:
    images, labels = bars(120)
    settings = make(NOISY, fit={"epochs": 1, "batch_size": 64})
    before = train_dp(settings, private(settings))
    write_data(tmp_path, images[1:], labels[1:])
    after = train_dp(settings, private(settings))
    moved = (before.train_count - after.train_count, before.holdout_count - after.holdout_count)
    assert moved in [(1, 0), (0, 1)]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_batch_statistics_give_way_to_groups(architecture: str) -> None:
    network = grouped(build(architecture, classes=3, channels=1, seed=0))
    kinds = [type(module) for module in network.modules()]
    assert nn.BatchNorm2d not in kinds
    assert all(m.num_groups == GROUPS for m in network.modules() if isinstance(m, nn.GroupNorm))
    assert not any(getattr(module, "inplace", False) for module in network.modules())
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.train()(images)[:1], network(images[:1]))  # no sample sees another


def test_what_is_frozen_stays(make: Make) -> None:
    settings = make(NOISY, fit=SHORT, teacher={"architecture": "python:helpers.own_networks:kept"})
    train_dp(settings, private(settings))
    learned = load_file(settings.state / "privacy" / "dp-sgd" / "model.safetensors")
    seed = derive(settings.seed, "teacher weights")
    fresh = build("python:helpers.own_networks:kept", classes=3, channels=1, seed=seed).state_dict()
    changed = {name for name, held in learned.items() if not torch.equal(held, fresh[name])}
    assert changed == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}


def test_a_batch_may_be_empty(make: Make) -> None:
    settings = make({**NOISY, "noise_multiplier": 5}, fit={"epochs": 1, "batch_size": 1})
    record = train_dp(settings, private(settings))
    assert record.event.steps == record.train_count
    assert np.isfinite(load_private(settings).log_probs(bars(3)[0])).all()


def test_sampling_by_the_batch_size() -> None:
    assert sampling(100, Fit(batch_size=10)) == (0.1, 10)
    assert sampling(5, Fit(batch_size=64)) == (1.0, 1)


def test_a_network_that_cannot_be_taught_so_is_refused(make: Make) -> None:
    settings = make(NOISY, teacher={"architecture": "vit_b_16", "preprocessing": {"size": [224, 224]}})
    with pytest.raises(TeacherError, match=r"vit_b_16: opacus .* Choose another teacher.architecture, .*cnn3, resnet8"):
        train_private(settings)
    with pytest.raises(TeacherError, match="holds no trained teacher"):
        load_teacher(settings)


def test_weights_that_are_not_finite_are_no_teacher(make: Make) -> None:
    settings = make({**NOISY, "clip": 1e6, "noise_multiplier": 1e9}, fit=SHORT | {"learning_rate": 10})
    with pytest.raises(TeacherError, match=r"Training failed in epoch \d of 2.*Lower teacher.fit.learning_rate"):
        train_private(settings)


def test_other_settings_are_another_teacher(make: Make) -> None:
    settings = make(NOISY, fit=SHORT)
    with pytest.raises(TeacherError, match="holds no trained teacher"):
        answering_costs(settings, 1)
    train_private(settings)
    with pytest.raises(TeacherError, match="other settings"):
        load_teacher(make({**NOISY, "noise_multiplier": 0.5}, fit=SHORT))
    assert load_teacher(make({**NOISY, "delta": 1e-6}, fit=SHORT)).fingerprint == load_teacher(settings).fingerprint
    (settings.state / "privacy" / "dp-sgd" / "teacher.json").write_text("{}")
    with pytest.raises(TeacherError, match="is not as it must be"):
        load_teacher(settings)


def test_without_opacus_the_extra_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingExtraError, match=r"consilience\[privacy\]"):
        train_private(make(NOISY, fit=SHORT))
