"""The whole job on one machine: sites that exist only here, in one process, the real apps at both ends.

Lives here: making the sites (data, pools, site.yaml, key and kit), training their teachers, and running ServerApp and
ClientApp over the in-process Grid. Does not live here: anything a real job would do otherwise. RUN/simulation holds
what in production lies at the sites and in the server's folder.
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict
from numpy.typing import NDArray

from consilience.client.app import app as client_app
from consilience.client.app import forget_sites
from consilience.client.coverage import learn_and_show
from consilience.client.features import learn_and_show_bases
from consilience.client.features.untrained import check_untrained
from consilience.client.privacy import train_private, training_epochs
from consilience.client.teacher import calibrate_any
from consilience.common.data import ImageData, open_data
from consilience.common.epochs import epoch_task
from consilience.common.errors import DataError, RunError, SettingsError
from consilience.common.files import atomic, lock, read_json, write_json
from consilience.common.identity import Request, load_key, make_key
from consilience.common.labels import LabelSpace
from consilience.common.pool import Pool
from consilience.common.progress import Reporter
from consilience.common.settings import JobSettings, Judge, NpzData, Simulation, SiteSettings
from consilience.common.settings_file import dump_settings, load_settings
from consilience.deploy.local_grid import SERVER_NODE, LocalGrid
from consilience.deploy.partition import Partition, partition
from consilience.deploy.partition_groups import Coarse, coarsened, without_groups
from consilience.deploy.partition_labels import partition_labels
from consilience.server.admission import Register
from consilience.server.app import app as server_app
from consilience.server.authority import authority_pem, ensure_authority
from consilience.server.chosen import Chosen
from consilience.server.learning import check_student
from consilience.server.settings import Home, ServerSettings

WORKERS = 4
"""Sites that answer at the same time."""
NOWHERE = ServerSettings(address="localhost:9092")
"""What kits name as the server's address, where messages do not travel."""


def embedded_job() -> JobSettings:
    """Return the job that `consilience simulate` does without a file."""
    with resources.as_file(resources.files("consilience") / "deploy" / "example" / "job.yaml") as path:
        return load_settings(path, JobSettings)


def simulate(job: JobSettings, run: Path, reporter: Reporter, *, quiet: bool = False) -> None:
    """Do `job` in the folder `run`, from wherever an earlier run of the same job stopped.

    Raises `RunError` when the folder holds a run of another job, and whatever the stages raise.
    """
    run = run.resolve()
    with lock(run):
        _, paths = prepare_run(job, run, reporter)
        forget_sites()
        nodes = [{"site": str(path)} for path in paths]
        home = server_home(run)
        with LocalGrid(client_app, nodes, workers=WORKERS) as grid:
            context = Context(
                run_id=1,
                node_id=SERVER_NODE,
                node_config={},
                state=RecordDict(),
                run_config={"run": str(run), "quiet": quiet, "home": "" if home is None else str(home.folder)},
            )
            server_app(grid=grid, context=context)


def server_home(run: Path) -> Home | None:
    """Return the folder in which a simulation admitted its sites; None for a run that began before it did so."""
    home = Home(run / "simulation" / "server")
    return home if home.sites.exists() else None


def prepare_run(job: JobSettings, run: Path, reporter: Reporter) -> tuple[JobSettings, list[Path]]:
    """Make the run folder with job.yaml, and sites with trained teachers; returns the job and the sites' files.

    Raises `SettingsError` when the job has no simulation, `RunError` when the folder holds a run of another job.
    """
    if job.simulation is None:
        raise SettingsError(
            "The job has no field 'simulation'", hint="Say how to make sites from one labelled data set"
        )
    settings = _with_simulated_parts(job, run)
    _keep_job(settings, run)
    paths = prepare(job.simulation, job, run, reporter)
    for path in paths:
        check_untrained(load_settings(path, SiteSettings))
    began = time.perf_counter()
    for path in paths:
        train_site(path, reporter)
    timing = run / "timing.json"
    if not timing.exists():
        write_json(timing, {"teachers": time.perf_counter() - began})
    return settings, paths


def _with_simulated_parts(job: JobSettings, run: Path) -> JobSettings:
    """Fill in the paths of the pools and the test data that the simulation makes.

    Raises `SettingsError` when the job names a pool or judging data itself: the simulation would not use them.
    """
    home = run / "simulation"
    if job.pool not in (None, home / "pool"):
        raise SettingsError("job.yaml: fields 'pool' and 'simulation' exclude each other", hint="Leave one of them out")
    if job.judge != Judge() and job.pool is None:
        raise SettingsError(
            "job.yaml: fields 'judge' and 'simulation' exclude each other", hint="Leave one of them out"
        )
    judge = job.judge.model_copy(
        update={
            "test": NpzData(kind="npz", path=home / "test.npz"),
            "test_pool": home / "test-pool",
            "pool_labels": home / "pool-labels.npy",
        }
    )
    return job.model_copy(update={"pool": home / "pool", "judge": judge})


def _keep_job(job: JobSettings, run: Path) -> None:
    path = run / "job.yaml"
    if not path.exists():
        if any(not child.name.startswith(".") for child in run.iterdir()):
            raise RunError(f"{run} is not empty and holds no run", hint="Name another folder with --out")
        dump_settings(job, path)
        return
    earlier = load_settings(path, JobSettings)
    here = {"pool": job.pool, "judge": job.judge}  # a run folder may have been moved
    if not earlier.model_copy(update=here).same_job(job):
        raise RunError(f"{run} already holds a run of another job or seed", hint="Name another folder with --out")
    if earlier != job:
        dump_settings(job, path)


def prepare(simulation: Simulation, job: JobSettings, run: Path, reporter: Reporter) -> list[Path]:
    """Make pool, test set and one folder a site in RUN/simulation; returns the sites' files. Done once."""
    home = run / "simulation"
    done = home / "prepared.json"
    if done.exists():
        return [home / "sites" / name / "site.yaml" for name in read_json(done)["sites"]]
    data, test = open_data(simulation.data), open_data(simulation.test)
    check_student(job.student, data.shape)
    # Before teachers are trained: which of the data's classes sites have is known later.
    multi = any(teacher.labels == "multi" for teacher in simulation.teachers)
    Chosen.of(job, LabelSpace.build({"simulation.data": data.class_names}, job.labels.synonyms, multi=multi))
    if data.shape != test.shape or data.class_names != test.class_names:
        raise DataError(
            "simulation.data and simulation.test differ in image shape or class names", hint="Use one data set's splits"
        )
    simulation, coarse = without_groups(simulation, job.labels, data.class_names)
    labels, parts = _shared_out(data, simulation, job.seed)
    reporter.say(f"Making {len(parts.sites)} sites and a pool of {len(parts.pool)} images in {home}")
    Pool.build(replace(data.subset(parts.pool), labels=None, many=None), home / "pool")
    with atomic(home / "pool-labels.npy") as file:
        np.save(file, labels[parts.pool])
    Pool.build(test, home / "test-pool")
    _write_npz(home / "test.npz", test)
    about = (home, simulation, job, data, parts)
    paths = [_make_site(*about, i, coarse[i] if coarse else {}) for i in range(len(parts.sites))]
    write_json(
        done,
        {
            "sites": [path.parent.name for path in paths],
            "classes": list(data.class_names),
            "counts": parts.counts.tolist(),
        },
    )
    return paths


def _shared_out(data: ImageData, simulation: Simulation, seed: int) -> tuple[NDArray[np.integer[Any]], Partition]:
    """Return the labels, (n,) or (n, L), and who gets which image. Raises `DataError`, `SettingsError`."""
    if any(teacher.labels == "multi" for teacher in simulation.teachers):
        many = data.need_many("simulation.data, for teachers with labels: multi,")
        single = [at for at, teacher in enumerate(simulation.teachers) if teacher.labels == "single"]
        if single:
            raise SettingsError(
                f"simulation.teachers.{single[0]}.labels is 'single', and others are 'multi': one data set is of one "
                "kind",
                hint="Set labels alike for all teachers",
            )
        return many, partition_labels(many, data.class_names, simulation, seed)
    labels = data.need_labels("simulation.data")
    return labels, partition(labels, data.class_names, simulation, seed)


def _make_site(
    home: Path,
    simulation: Simulation,
    job: JobSettings,
    data: ImageData,
    parts: Partition,
    index: int,
    groups: Coarse,
) -> Path:
    name = f"site-{index + 1:0{len(str(len(parts.sites)))}d}"
    folder = home / "sites" / name
    own = coarsened(data.subset(parts.sites[index]), groups)
    if own.many is not None:
        known = list(parts.classes[index])
        own = replace(own, many=own.many[:, known], class_names=tuple(data.class_names[k] for k in known))
    _write_npz(folder / "private.npz", own)
    settings = SiteSettings(
        name=name,
        data=NpzData(kind="npz", path=Path("private.npz")),
        teacher=simulation.teachers[index % len(simulation.teachers)],
        coverage=simulation.coverage,
        policy=simulation.policy,
        privacy=simulation.privacy,
        calibration=simulation.calibration,
        pools=(Path("../../pool"), Path("../../test-pool")),
        seed=int(np.random.SeedSequence([job.seed, index]).generate_state(1)[0]),
    )
    dump_settings(settings, folder / "site.yaml")
    admit(Home(home / "server"), load_settings(folder / "site.yaml", SiteSettings), NOWHERE)
    return folder / "site.yaml"


def admit(home: Home, site: SiteSettings, server: ServerSettings) -> None:
    """Give a site a key, where it has none, and a kit; the server's folder then knows its key.

    All parts of admission in one place: only a simulation holds both sides.
    """
    ensure_authority(home)
    key = load_key(site.key) if site.key.exists() else make_key(site.key)
    register = Register(home)
    record = register.approve(Request.make(key, site.name, "this machine"))
    register.kit(record, server, authority_pem(home)).write(site.kit)


def _write_npz(path: Path, data: ImageData) -> None:
    labels = data.need_labels("The data set") if data.many is None else data.many
    with atomic(path) as file:
        np.savez_compressed(file, x=data.read(), y=labels, names=np.array(data.class_names, np.str_))


def train_site(path: Path, reporter: Reporter) -> None:
    """Train and calibrate a site's teacher and learn what it tells beside; resumes, and returns at once when done."""
    settings = load_settings(path, SiteSettings)
    if settings.teacher.kind == "train":
        name = f"training {settings.name} ({settings.teacher.architecture})"
        train_private(settings, epoch_task(reporter, name, training_epochs(settings)))
        if settings.calibration != "off":
            calibrate_any(settings)
    if settings.policy.coverage != "off":
        learn_and_show(settings, reporter)
    learn_and_show_bases(settings, reporter)
