"""Two snakemakes for one checkout, one after the other was killed or both at once."""

from __future__ import annotations

import pytest
from cluster.runs import PATIENCE, Run
from cluster.slurm import wait

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


def test_killed_snakemake_leaves_no_second_writer(undisturbed: Run, disturbed: Run) -> None:
    """Its job lives on; the same command again submits another, which waits and does nothing."""
    snakemake = disturbed.start()
    job, process = disturbed.training()
    snakemake.process.kill()
    snakemake.process.wait()
    again = disturbed.start()
    wait(lambda: len(disturbed.jobs("train")) == 2, PATIENCE, "second job")
    (second,) = set(disturbed.jobs("train")) - {job}

    def said(text: str) -> bool:
        logs = disturbed.project.path("logs/slurm/rule_train").glob(f"*/{second}.log")
        return any(text in log.read_text() for log in logs)

    wait(lambda: said("waiting for"), PATIENCE, "waiting job")
    process.resume()
    disturbed.finish(again)
    assert set(disturbed.jobs("train").values()) == {"COMPLETED"}
    assert said("another job made it meanwhile")
    assert disturbed.card()["attempts"] == 1, "trained a second time"
    disturbed.check(undisturbed)
    disturbed.check_mlflow()


def test_two_snakemakes_at_work(undisturbed: Run, disturbed: Run) -> None:
    """Both submit every job; each artefact is made once."""
    pair = [disturbed.start(), disturbed.start()]
    for snakemake in pair:
        disturbed.finish(snakemake)
    assert disturbed.card()["attempts"] == 1
    logs = disturbed.project.path("logs/slurm")
    for rule in ("train", "export", "check", "generate", "score"):
        texts = [path.read_text() for path in logs.glob(f"rule_{rule}/*/*.log")]
        made = [text for text in texts if "another job made it meanwhile" not in text]
        assert len(made) == 1, f"{rule}: made {len(made)} times by {len(texts)} jobs"
    disturbed.check(undisturbed)
    disturbed.check_mlflow()
