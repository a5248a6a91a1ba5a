from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from consilience.common.epochs import EpochRecord
from consilience.common.errors import SettingsError
from consilience.common.nets import Supervised, build, load_model, save_model, train
from consilience.common.nets.loop import sgd
from consilience.common.nets.own_networks import check_own, code_of
from consilience.common.settings import Fit, Preprocessing
from helpers import own_networks

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]
CPU = torch.device("cpu")
FIT = Fit(epochs=3, batch_size=16, learning_rate=0.05, precision="f32")
OWN = "python:helpers.own_networks:"


class Interrupted(Exception):
    pass


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build(OWN + "kept", classes=4, channels=1, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.0.weight"], other["head.0.weight"])
    assert first["head.2.weight"].shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:", "'python:' names no function; allowed after python: are package.module:function"),
        ("python:os.path", "names no function"),
        ("python:a b:c", "names no function"),
        ("python:helpers.own_networks:frozen:x", "names no function"),
        ("python:no_such_package.networks:small", "module no_such_package.networks cannot be imported: ModuleNot"),
        (OWN + "missing", "helpers.own_networks has no such name; expected a callable 'missing'"),
        (OWN + "NUMBER", "has an object of type int; expected a callable 'NUMBER'"),
        (OWN + "nothing", "gives an object of type str; expected a torch.nn.Module"),
        (OWN + "all_frozen", "nothing can be taught: no parameter has requires_grad"),
        (OWN + "failing", "failed for 2 classes and 1 channels: KeyError: 'no weights here'"),
        (OWN + "positional", "failed for 2 classes and 1 channels: TypeError"),
        ("python:operator:add", "failed for 2 classes and 1 channels: TypeError"),
    ],
)
def test_mistakes_are_told_when_it_is_built(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)) as raised:
        build(name, classes=2, channels=1, seed=0)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ten", "gives (2, 10) torch.float32 for 2 images of shape (1, 16, 16); expected (2, 3) floating"),
        ("whole_numbers", "gives (2, 3) torch.int64"),
        ("several", "gives tuple"),
        ("colour", "does not take images of shape (1, 16, 16), channels first: RuntimeError"),
    ],
)
def test_what_it_gives_is_tried(name: str, words: str) -> None:
    network = build(OWN + name, classes=3, channels=1, seed=0)
    with pytest.raises(SettingsError, match=re.escape(words)):
        check_own(OWN + name, network, (1, 16, 16), 3)


def test_trying_it_changes_nothing() -> None:
    network = build(OWN + "frozen", classes=3, channels=1, seed=0)
    before = {name: held.clone() for name, held in network.state_dict().items()}
    check_own(OWN + "frozen", network, (1, 16, 16), 3)
    assert all(torch.equal(before[name], held) for name, held in network.state_dict().items())
    assert network.training


def test_frozen_parameters_stay_and_are_out_of_optimizer_and_checkpoint(stripes: Labelled, tmp_path: Path) -> None:
    images, labels = stripes
    network = build(OWN + "kept", classes=3, channels=1, seed=0)
    before = {name: held.clone() for name, held in network.state_dict().items()}
    assert len(sgd(network, FIT).param_groups[0]["params"]) == 2
    train(network, images, Supervised(labels, CPU), FIT, Preprocessing(), seed=0, folder=tmp_path, device=CPU)
    changed = {name for name, held in network.state_dict().items() if not torch.equal(before[name], held)}
    assert changed == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    names = {name.removeprefix("model.") for name in safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")}
    assert "backbone.0.weight" not in names
    assert {"head.0.weight", "backbone.1.running_mean"} <= names
    save_model(tmp_path / "model.safetensors", network)
    again = build(OWN + "kept", classes=3, channels=1, seed=9)
    load_model(tmp_path / "model.safetensors", again)
    assert all(torch.equal(held, again.state_dict()[name]) for name, held in network.state_dict().items())


def test_statistics_of_a_frozen_part_move_where_its_network_lets_them(stripes: Labelled) -> None:
    images, labels = stripes
    network = build(OWN + "frozen", classes=3, channels=1, seed=0)
    train(network, images, Supervised(labels, CPU), FIT, Preprocessing(), seed=0, folder=None, device=CPU)
    assert network.state_dict()["backbone.1.running_mean"].abs().sum() > 0


def test_an_interrupted_training_goes_on_with_the_frozen_parameters(
    stripes: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = stripes
    monkeypatch.setattr("consilience.common.nets.loop.SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def stop(record: EpochRecord) -> None:
        if record.epoch == 1:
            raise Interrupted

    def fitted(folder: Path | None, interrupt: bool = False) -> dict[str, torch.Tensor]:
        network = build(OWN + "frozen", classes=3, channels=1, seed=0)
        about = (network, images, Supervised(labels, CPU), FIT, Preprocessing())
        train(*about, seed=0, folder=folder, device=CPU, on_epoch=stop if interrupt else None)
        return network.state_dict()

    whole = fitted(None)
    with pytest.raises(Interrupted):
        fitted(tmp_path, interrupt=True)
    resumed = fitted(tmp_path)
    assert all(torch.equal(held, resumed[name]) for name, held in whole.items())


def test_the_code_is_part_of_what_it_is() -> None:
    assert code_of("cnn3") == {}
    assert code_of(OWN + "kept") == code_of(OWN + "frozen")  # one module
    assert re.fullmatch("[0-9a-f]{64}", code_of(OWN + "kept")["code"])
    assert Path(own_networks.__file__).exists()
