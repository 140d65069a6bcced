"""Jobs on several GPUs: which run beside each other and after which, what is left when the time is over."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import gpu_jobs
from scripts.gpu_jobs import Job, Machine, end_all, read_jobs, run_all, to_group

OPEN = Path(__file__).parents[1] / "profiles" / "smollm2-135m" / "jobs.yaml"


def test_gpus_are_shared_and_given_back() -> None:
    machine = Machine(2)
    half, whole = Job("half", "", 0.5), Job("whole", "", 1.0)
    assert machine.place(half) == [0] and machine.place(half) == [1]
    assert machine.place(whole) is None and machine.place(Job("both", "", 0.5, gpus=2)) == [0, 1]
    assert machine.place(half) is None
    machine.free(half, [1])
    assert machine.place(half) == [1]


def test_jobs_run_after_others_and_what_is_done_is_left_out(tmp_path: Path) -> None:
    jobs = [
        Job("second", f"cat {tmp_path}/made", after=("first",)),
        Job("first", f"echo once >> {tmp_path}/made"),
        Job("wrong", "exit 3"),
        Job("never", "true", after=("wrong",)),
    ]
    assert run_all(jobs, tmp_path, time.monotonic() + 60, 0) == ["wrong", "never"]
    assert run_all(jobs, tmp_path, time.monotonic() + 60, 0) == ["wrong", "never"]
    assert (tmp_path / "made").read_text() == (tmp_path / "second.log").read_text() == "once\n"


def test_what_runs_when_the_time_is_over_may_save_its_state(tmp_path: Path) -> None:
    command = f"trap 'touch {tmp_path}/saved; exit 1' TERM; touch {tmp_path}/up; while true; do sleep .05; done"
    process = subprocess.Popen(["bash", "-c", command], start_new_session=True)
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    end_all([process], to_group)
    assert process.returncode == 1 and (tmp_path / "saved").exists()


def test_jobs_end_with_the_one_who_runs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[subprocess.Popen[bytes]]()

    def start(*given: Any, **options: Any) -> Any:
        running = usual(*given, **options)
        started.append(running.process)
        return running

    def done(out: Path, name: str) -> bool:
        if started:
            raise KeyboardInterrupt
        return False

    usual = gpu_jobs.start
    monkeypatch.setattr(gpu_jobs, "start", start)
    monkeypatch.setattr(gpu_jobs, "done", done)
    with pytest.raises(KeyboardInterrupt):
        run_all([Job("long", "sleep 600"), Job("next", "true", after=("long",))], tmp_path, time.monotonic() + 60, 0)
    assert [process.poll() for process in started] == [-15]


def test_what_would_not_be_done_in_time_is_not_started(tmp_path: Path) -> None:
    assert run_all([Job("late", "true", minutes=60.0)], tmp_path, time.monotonic() + 60, 0) == ["late"]
    assert not (tmp_path / "late.log").exists()


@pytest.mark.parametrize(
    ("jobs", "wrong"),
    [
        ({"a": {"run": "{word}"}}, "no value for the word 'word'"),
        ({"a": {"run": "true", "share": 2}}, "expected a share of a GPU above 0 and at most 1, got 2"),
        ({"a": {"run": "true", "after": ["b"]}}, "there is no job b to wait for"),
    ],
)
def test_what_cannot_run_is_told(jobs: object, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read_jobs({"jobs": jobs}, {})


def test_the_open_rows_are_jobs() -> None:
    jobs = read_jobs(yaml.safe_load(OPEN.read_text()), {"out": "FOLDER", "texts": "DATA"})
    assert all("{" not in job.run and "--out FOLDER/" in job.run and "--texts DATA" in job.run for job in jobs)
