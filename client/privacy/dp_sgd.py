"""The teacher that is trained by noisy gradients, with opacus.

Lives here: the network without batch statistics, the training, its event, and loading what came out. Does not live
here: which records are learned from (records), what is drawn at random (dp_draws), what the training cost (accounting).

state/privacy/dp-sgd/ holds model.safetensors and teacher.json (a `DpSgdTeacher`). There is no checkpoint: a training
that is interrupted begins anew, with the same noise, and nothing has left before it is done.
"""

from __future__ import annotations

import importlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience.client.privacy.accounting import EXTRA
from consilience.client.privacy.dp_draws import noisy_optimizer, poisson
from consilience.client.privacy.events import DpSgdTraining, sampling
from consilience.client.privacy.noise import Stream, load_secret
from consilience.client.privacy.records import Places, places
from consilience.client.teacher.kept_training import (
    MODEL,
    RECORD,
    RETRAIN,
    TrainedTeacher,
    done_in,
    settings_digest,
    trained_in,
    wanted,
)
from consilience.client.teacher.private_samples import present_classes, private_data
from consilience.client.teacher.protocol import ScoringTeacher, brief
from consilience.client.teacher.trained import accuracy, as_used, teacher_of
from consilience.common.data import ImageData
from consilience.common.epochs import EpochRecord
from consilience.common.errors import MissingExtraError, TeacherError
from consilience.common.files import canonical_json, lock, sha256, sha256_file, write_json
from consilience.common.nets import Supervised, build, default_device, save_model
from consilience.common.nets.architectures import ARCHITECTURES
from consilience.common.nets.batches import Pixels, Windows
from consilience.common.nets.loop import one_cycle, sgd
from consilience.common.seeds import derive
from consilience.common.settings import DpSgd, Fit, SiteSettings, TrainTeacher

GROUPS = 8
"""Groups of channels that are normalised together, at most, where a network had batch normalisation."""


class DpSgdTeacher(TrainedTeacher):
    """teacher.json: what was trained, and what it cost."""

    event: DpSgdTraining


def grouped(network: nn.Module) -> nn.Module:
    """Put group normalisation, of `GROUPS` groups or fewer, in the place of every batch normalisation, and return it.

    Statistics of a batch mix its samples, so that no sample's gradient can be told from the others'. No layer writes
    over what it reads any more, since gradients by the sample need it.
    """
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            group = nn.GroupNorm(math.gcd(GROUPS, child.num_features), child.num_features)
            frozen = child.affine and not child.weight.requires_grad
            setattr(network, name, group.requires_grad_(not frozen))
        else:
            grouped(child)
    if hasattr(network, "inplace"):
        vars(network)["inplace"] = False
    return network


def train_dp(
    settings: SiteSettings,
    private: DpSgd,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    data: ImageData | None = None,
) -> DpSgdTeacher:
    """Train the site's teacher by DP-SGD on its private data, or on `data`; returns at once when it is trained.

    Each step takes every record with chance `batch_size` / records, cuts each one's gradient to `clip`, adds noise
    `noise_multiplier * clip` to their sum and divides by the batch size expected. Raises what `train_teacher` raises,
    and `MissingExtraError` without opacus.
    """
    teacher, folder = wanted(settings), _folder(settings)
    data = private_data(settings) if data is None else data
    labels, classes = present_classes(data)
    found = places(data, 1, teacher.holdout, settings.seed)
    learned, held_out = found.ids(0), found.ids(-1)
    if not len(learned):
        raise TeacherError(f"{settings.name}: all {len(data)} images are held out", hint="Lower teacher.holdout")
    with lock(folder):
        if (done := done_in(folder, DpSgdTeacher, _digest(settings, private), found.digest)) is not None:
            return done
        used = as_used(teacher.preprocessing, data.shape)
        model = grouped(
            build(
                teacher.architecture,
                classes=len(classes),
                channels=used.channels or data.shape[2],
                seed=derive(settings.seed, "teacher weights"),
            )
        )
        # Noise and samples are the site's secret, and others for other data: two trainings under one noise would
        # show, by their difference, what it hid.
        purpose, secret = ["dp-sgd", _digest(settings, private), found.digest], load_secret(settings)
        streams = {drawn: secret.stream([*purpose, drawn]) for drawn in ("noise", "samples", "windows")}
        device = default_device()
        pixels = Pixels(data.read(learned), used, device)
        loss = Supervised(labels[learned], device)
        curve, steps, rate = _fit(model.to(device), pixels, loss, teacher, private, streams, on_epoch)
        save_model(folder / MODEL, model)
        digest = sha256_file(folder / MODEL)
        record = DpSgdTeacher(
            classes=classes,
            architecture=teacher.architecture,
            preprocessing=used,
            holdout_accuracy=accuracy(model, data, labels, held_out, used),
            holdout_count=len(held_out),
            train_count=len(learned),
            learning_curve=tuple(curve),
            settings_digest=_digest(settings, private),
            data_digest=found.digest,
            model_digest=digest,
            event=DpSgdTraining(noise_multiplier=private.noise_multiplier, sample_rate=rate, steps=steps, run=digest),
        )
        write_json(folder / RECORD, record.model_dump(mode="json"))
        return record


def learned_places(settings: SiteSettings, private: DpSgd, data: ImageData) -> Places:
    """Return which of the private `data` the teacher learned from: part 0, and -1 for those held out.

    Raises `TeacherError` when it is missing, of other settings, or was trained on other data.
    """
    found = places(data, 1, wanted(settings).holdout, settings.seed)
    if dp_record(settings, private).data_digest != found.digest:
        raise TeacherError(
            f"{settings.name}: the private data are not those that the teacher was trained on", hint=RETRAIN
        )
    return found


def load_dp(settings: SiteSettings, private: DpSgd) -> ScoringTeacher:
    """Load what `train_dp` wrote. Raises `TeacherError` when it is not there or of other settings."""
    record = dp_record(settings, private)
    channels = record.preprocessing.channels or 1
    module = grouped(build(record.architecture, classes=len(record.classes), channels=channels, seed=0))
    return teacher_of(_folder(settings), record, module, "dp-sgd")


def dp_record(settings: SiteSettings, private: DpSgd) -> DpSgdTeacher:
    """Return what was trained. Raises `TeacherError` when it is not there or of other settings."""
    return trained_in(_folder(settings), DpSgdTeacher, _digest(settings, private))


def _fit(
    model: nn.Module,
    pixels: Pixels,
    loss: Supervised,
    teacher: TrainTeacher,
    private: DpSgd,
    streams: Mapping[str, Stream],
    on_epoch: Callable[[EpochRecord], None] | None,
) -> tuple[list[EpochRecord], int, float]:
    """Train `model`; return the epochs, how many steps there were, and each record's chance to be in one."""
    opacus, fit = _opacus(), teacher.fit
    n, device = len(pixels), pixels.device
    rate, steps = sampling(n, fit)
    total, records, taken = fit.epochs * steps, list[EpochRecord](), 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*backward hook.*")  # of the first layer, whose input wants no gradient
        wrapped = _wrapped(model.train(), teacher.architecture, opacus)
        optimizer = noisy_optimizer(
            opacus,
            sgd(model, fit),
            streams["noise"],
            noise_multiplier=private.noise_multiplier,
            max_grad_norm=private.clip,
            expected_batch_size=max(1, round(n * rate)),
        )
        windows = torch.Generator()
        losses, began = [0.0, 0], time.perf_counter()
        for taken, ids in enumerate(poisson(n, rate, total, streams["samples"]), 1):
            # Seeded anew in each step: it keeps 32 bits, and a window goes by the place in the batch, which a record
            # more would shift.
            windows.manual_seed(int(streams["windows"].words(1)[0] >> np.uint64(1)))
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(taken - 1, total, fit.learning_rate)
            optimizer.zero_grad(set_to_none=True)
            losses[0] += _gradients(wrapped, pixels, loss, ids, fit, windows)
            losses[1] += len(ids) > 0
            optimizer.step()
            if taken % steps == 0:
                record = _epoch(model, taken // steps - 1, losses, optimizer, began, fit)
                records.append(record)
                losses, began = [0.0, 0], time.perf_counter()
                if on_epoch is not None:
                    on_epoch(record)
        wrapped.remove_hooks()
        for parameter in model.parameters():
            for held in ("grad_sample", "summed_grad"):
                vars(parameter).pop(held, None)  # a frozen one has none
    model.to(device).eval()
    return records, taken, rate


def _wrapped(model: nn.Module, architecture: str, opacus: Any) -> Any:
    """Return the network with gradients by the sample. Raises `TeacherError` for one that cannot have them."""
    errors = opacus.validators.ModuleValidator.validate(model, strict=False)
    try:
        if errors:
            raise errors[0]
        return opacus.GradSampleModule(model)
    except Exception as error:  # opacus has a kind of its own for every layer
        raise TeacherError(
            f"{architecture}: opacus has no gradient by the sample for it: {brief(error)}",
            hint=f"Choose another teacher.architecture, for example one of: {', '.join(ARCHITECTURES)}",
        ) from error


def _gradients(
    wrapped: Any, pixels: Pixels, loss: Supervised, ids: Tensor, fit: Fit, windows: torch.Generator
) -> float:
    """Leave each sample's gradient in the parameters, and return the mean loss. A batch may be empty."""
    if not len(ids):
        for parameter in wrapped.parameters():
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        return 0.0
    cut = Windows.draw(len(ids), pixels.shape[:2], windows, flip=fit.mirror) if fit.augment else None
    ids = ids.to(pixels.device)
    value = loss(wrapped(pixels.batch(ids, cut)), ids)
    torch.autograd.backward(value)
    return float(value.detach())


def _epoch(model: nn.Module, epoch: int, losses: list[float], optimizer: Any, began: float, fit: Fit) -> EpochRecord:
    """Return the epoch's record. Raises `TeacherError` when the weights are not finite."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise TeacherError(
            f"Training failed in epoch {epoch + 1} of {fit.epochs}: the weights are not finite",
            hint=f"Lower teacher.fit.learning_rate, for example to {fit.learning_rate / 4:.2g}",
        )
    mean = losses[0] / max(1, losses[1])
    return EpochRecord(epoch, mean, float(optimizer.param_groups[0]["lr"]), time.perf_counter() - began)


def _opacus() -> Any:
    try:
        library = importlib.import_module("opacus")
        importlib.import_module("opacus.validators")
    except ModuleNotFoundError as error:
        raise MissingExtraError("privacy.mechanism dp-sgd needs opacus", hint=EXTRA) from error
    return library


def _digest(settings: SiteSettings, private: DpSgd) -> str:
    trained = settings_digest(wanted(settings), settings.seed)
    return sha256(canonical_json([trained, private.model_dump(mode="json", exclude={"delta"})]))


def _folder(settings: SiteSettings) -> Path:
    return settings.state / "privacy" / "dp-sgd"
