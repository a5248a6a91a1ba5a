"""`site taps`, `train`, `show` and `explain` of a site that tells features: what people and programs read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from consilience.client.app import forget_sites
from consilience.client.check import Preflight
from consilience.client.site import Site
from consilience.common.data import from_arrays
from consilience.common.encoding import feature_bytes
from consilience.common.encoding.features import basis_bytes
from consilience.common.pool import Pool
from consilience.common.protocol import Contract
from helpers.commands import call, said
from helpers.feature_site import CALLABLE, CLASSES, SIZE, hosted, make_pool, make_settings

TAPS: dict[str, Any] = {"*": {"size": 4, "channels": 8}, "penultimate": {}}


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    forget_sites()
    return make_pool(tmp_path / "pool")


@pytest.fixture
def file(tmp_path: Path, pool: Pool) -> Path:
    make_settings(tmp_path, TAPS)
    return tmp_path / "site.yaml"


def job(file: Path, **student: Any) -> Path:
    path = file.with_name("job.yaml")
    path.write_text(yaml.safe_dump({"name": "clothes", "pool": "pool", "student": student}))
    return path


def test_taps_lists_what_there_is_and_what_of_it_leaves(file: Path, pool: Pool) -> None:
    make_settings(file.parent, {"layer2": {"size": 4, "channels": 8}})
    before = call("taps", file)
    assert [(row["tap"], row["shape"], row["leaves"]) for row in before["taps"]] == [
        ("layer1", [32, 16, 16], None),
        ("layer2", [64, 8, 8], [8, 4, 4]),
        ("layer3", [128, 4, 4], None),
        ("penultimate", [128], None),
    ]
    assert before["taps"][1]["kept"] is None
    text = said("taps", file)
    assert "not learned yet" in text
    assert "does not leave" in text
    call("train", file)
    row = call("taps", file)["taps"][1]
    assert 0 < row["kept"] < 1
    assert row["bytes_a_sample"] == {"f16": 256, "u8": 136}
    assert row["components"] == basis_bytes(8, 64)
    assert row["bytes"] == {pool.digest: {"f16": 256 * SIZE, "u8": 136 * SIZE}}
    text = said("taps", file)
    assert f"{row['kept']:.1%}" in text
    assert f"{256 * SIZE:,}" in text
    assert f"at most {2**30:,} bytes" in text
    assert f"Principal components themselves are {row['components']:,} bytes, which count" in " ".join(text.split())


def test_taps_of_a_policy_that_lets_none_out(file: Path, pool: Pool) -> None:
    make_settings(file.parent, {})
    assert [row["leaves"] for row in call("taps", file)["taps"]] == [None] * 4
    assert "penultimate" in said("taps", file)


def test_taps_of_a_teacher_without_any(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tapless_model.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    make_settings(tmp_path, {}, teacher={**hosted("plain"), "callable": "tapless_model:plain"})
    assert call("taps", file) == {"taps": [], "limit": None}
    assert "A teacher of kind callable has no taps here: it takes part by its labels." in said("taps", file)


def test_a_tap_that_does_not_exist_is_an_error_of_the_settings_and_listed_with_those_that_do(file: Path) -> None:
    make_settings(file.parent, {"layer9": {}, "penultimate": {}})
    error = call("show", file, code=3)
    assert "policy.features.taps.layer9 is no tap of the teacher; it has: layer1, layer2" in error["message"]
    rows = call("taps", file)["taps"]
    assert [row["tap"] for row in rows] == ["layer1", "layer2", "layer3", "penultimate", "layer9"]
    assert rows[-1] == {"tap": "layer9", "shape": None, "leaves": None}
    assert [row["leaves"] for row in rows[3:]] == [[128], None]
    assert "is no tap of the teacher; the policy names it" in said("taps", file)


def test_a_tap_that_the_teacher_will_not_have_costs_no_training(file: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 1), np.uint8)
    np.savez(file.with_name("private.npz"), x=images, y=np.arange(60) % 3, names=np.array(["a", "b", "c"]))
    data, teacher = {"kind": "npz", "path": "private.npz"}, {"kind": "train", "architecture": "cnn3"}
    make_settings(file.parent, {"layer9": {}}, data=data, teacher=teacher)
    error = call("train", file, code=3)
    assert "policy.features.taps.layer9 is no tap of the teacher; it has: layer1, layer2, layer3" in error["message"]
    assert not [path for path in (file.parent / "state").rglob("*") if path.is_file()]


def test_train_learns_components_of_which_the_card_tells_a_digest(file: Path) -> None:
    error = call("show", file, code=7)
    assert "principal components of layer1, layer2, layer3" in error["message"]
    assert error["hint"] == "Run `consilience site train`"
    card = call("train", file)
    assert [tap["name"] for tap in card["features"]["taps"]] == ["layer1", "layer2", "layer3", "penultimate"]
    held = card["features"]["taps"][0]["components"]
    assert (held["number"], held["bytes"], len(held["digest"])) == (8, basis_bytes(8, 32), 64)
    assert sum(map(len, held.keys())) + len(str(held)) < 300  # none of the components themselves
    assert card["features"]["taps"][3]["components"] is None
    text = " ".join(said("show", file).replace("│", " ").split())  # of a table's cell
    assert "layer2: 8 x 4 x 4 of 64 channels, with " in text
    assert f"of their variance (components: {basis_bytes(8, 64):,} bytes), 256 bytes a sample" in text
    assert "256 bytes a sample; " in text
    assert "penultimate: 128, 256 bytes a sample; as f16 or u8" in text


def test_explain_tells_features_as_the_server_would_ask_for_them(file: Path, pool: Pool) -> None:
    call("train", file)
    layer = feature_bytes(8 * 16, "f16")
    everything = call("explain", job(file, architecture="cnn3", learning="layer-wise"), file)
    parts = [part for part in everything["parts"] if part["kind"] == "features"]
    assert [part["tap"] for part in parts] == ["layer1", "layer2", "layer3"]  # penultimate is none that is amalgamated
    assert [part["bytes_a_sample"] for part in parts] == [layer] * 3
    assert [(part["shape"], part["samples"], part["pool"]) for part in parts[:1]] == [([8, 4, 4], SIZE, pool.digest)]
    components = sum(basis_bytes(8, channels) for channels in (32, 64, 128))
    new = SIZE * 3 * layer + components
    assert everything["feature_bytes"] == {
        "asked": new,
        "components": components,
        "new": new,
        "most": 2**30,
        "left": {
            "features of job clothes": {"before": 2**30, "after": 2**30 - new},
            "features, lifetime": {"before": 2**32, "after": 2**32 - new},
        },
    }
    assert everything["new"] == 4 * SIZE
    text = said("explain", job(file, architecture="cnn3", learning="layer-wise"), file)
    assert f"with {components:,} of principal components that leave with the agreement" in text
    assert (
        "- with the agreement, the principal components of tap layer2 themselves: 8 of 64 channels, "
        f"{basis_bytes(8, 64):,} bytes\n"
    ) in text
    one = job(file, architecture="cnn3", learning="common-feature")
    assert [part["tap"] for part in call("explain", one, file)["parts"]] == ["", "penultimate"]
    text = said("explain", one, file)
    assert (
        f"- features of tap penultimate, 128, 256 bytes a sample, {256 * SIZE:,} in all, as f16, of 50 samples" in text
    )
    assert f"Features are {256 * SIZE:,} bytes in all; a job may ask for {2**30:,}." in text
    assert f"- features, lifetime: {2**32:,} -> {2**32 - 256 * SIZE:,} bytes" in text
    assert "features leave of: every layer, penultimate; at most" in text
    assert "It would be answered." in text
    plain = call("explain", job(file), file)
    assert [part["kind"] for part in plain["parts"]] == ["log-probs"]
    assert plain["feature_bytes"]["asked"] == 0


def test_the_ledger_s_bytes_of_features_are_shown(file: Path, pool: Pool) -> None:
    make_settings(file.parent, {"penultimate": {}}, features={"bytes": 9_000})
    assert call("ledger", "show", file)["features"] == {"jobs": {}, "lifetime": 0, "components": []}
    with closing(Site.load(file)) as site:
        site.answer(site.question("clothes", pool.digest, 30, "features", "f16", site.taps[0]))
    told = {"jobs": {"clothes": 7_680}, "lifetime": 7_680, "components": []}
    assert call("ledger", "show", file)["features"] == told
    text = " ".join(said("ledger", "show", file).replace("│", " ").split())
    assert "features of job clothes 7,680 bytes 9,000 bytes" in text
    assert f"features, lifetime 7,680 bytes {2**32:,} bytes" in text
    told = call("explain", job(file, learning="common-feature"), file)
    assert told["feature_bytes"]["new"] == 20 * 256  # of 50
    assert told["feature_bytes"]["left"]["features of job clothes"] == {"before": 1_320, "after": 1_320 - 20 * 256}
    assert "which are 3,800 too few bytes" in said("explain", job(file, learning="common-feature"), file)


def test_explain_says_why_features_would_be_refused(file: Path) -> None:
    make_settings(file.parent, {"penultimate": {}}, features={"bytes": 256 * SIZE - 1})
    wanted = job(file, learning="common-feature")
    assert "policy.features.bytes and bytes_lifetime (job clothes: 12,800" in (call("explain", wanted, file)["refusal"])
    make_settings(file.parent, {"penultimate": {}})
    spaces = [{"sites": {"site-1": "layer2"}}]
    refusal = call("explain", job(file, learning="common-feature", common_feature={"spaces": spaces}), file)["refusal"]
    assert "asks for what the site does not tell" in refusal
    assert "tells the features of: penultimate" in refusal


def test_a_job_whose_features_do_not_fit_is_not_approved(file: Path) -> None:
    make_settings(file.parent, {"penultimate": {}}, policy={"approval": True})
    spaces = [{"sites": {"site-1": "layer2"}}]
    wanted = job(file, learning="common-feature", common_feature={"spaces": spaces})
    error = call("approve", wanted, file, code=3)
    assert "asks for what site site-1 does not tell" in error["message"]
    with closing(Site.load(file)) as site:
        assert site.ledger.approved("clothes", site.settings.policy.version) is None


def test_approve_covers_features_of_whichever_pool_of_the_site_is_the_job_s(file: Path, pool: Pool) -> None:
    other = make_pool(file.parent / "other", size=20, seed=1)
    make_settings(file.parent, {"penultimate": {}}, policy={"approval": True}, pools=["pool", "other"])
    wanted = job(file, learning="common-feature")
    wanted.write_text(wanted.read_text().replace("pool: pool", "pool: /coordinators/pool"))
    held = call("approve", wanted, file)
    assert [part["pool"] for part in held["parts"] if part["kind"] == "features"] == [pool.digest, other.digest]
    told = call("explain", wanted, file)
    assert told["feature_bytes"]["asked"] == 256 * SIZE  # of one of them, whichever it is
    assert "A job takes features of one of them alone." in said("explain", wanted, file)
    with closing(Site.load(file)) as site:
        for one in (pool, other):
            asked = Contract(
                job="clothes", labels=CLASSES, class_set=(0, 1, 2), pools=(one.digest,), encoding="f16",
                teacher=site.teacher.fingerprint, features=("penultimate",),
            )  # fmt: skip
            assert site.agree(asked).pools == (one.digest,)


def test_approve_is_of_the_features_that_are_shown(file: Path) -> None:
    make_settings(file.parent, {"penultimate": {}}, policy={"approval": True})
    held = call("approve", job(file, learning="common-feature"), file)
    assert [(part["kind"], part["tap"]) for part in held["parts"]] == [("log-probs", ""), ("features", "penultimate")]
    assert held["refusal"] is None
    assert "not approved" not in said("explain", job(file), file)
    make_settings(file.parent, {"penultimate": {}, "layer1": {}}, policy={"approval": True})
    assert "nobody at the site has approved" in said("explain", job(file), file)


def test_check_tries_features_on_every_pool(file: Path) -> None:
    """Where images of another size give maps of another size, a job over that pool could not have them."""
    large = np.zeros((4, 32, 32, 1), np.uint8)
    Pool.build(from_arrays(large, None, (), where="test"), file.parent / "large")
    as_it_is = {"channels": 1, "mean": [0.5], "std": [0.25]}
    teacher = {**make_settings(file.parent, {}).teacher.model_dump(mode="json"), "preprocessing": as_it_is}
    found = {}
    for size, pools in ((None, ["pool", "large"]), (4, ["pool", "large"]), (None, ["pool"])):
        make_settings(file.parent, {"layer2": {"size": size}}, teacher=teacher, pools=pools)
        preflight = Preflight(file)
        preflight.run()
        found[size, len(pools)] = next(row for row in preflight.rows if row.check == "features")
    assert {key: row.result for key, row in found.items()} == {(None, 2): "problem", (4, 2): "ok", (None, 1): "ok"}
    told = found[None, 2].found
    assert told.startswith(str(file.parent / "large"))
    assert "Tap 'layer2' gives (64, 16, 16) a sample; its card says (64, 8, 8)" in told
