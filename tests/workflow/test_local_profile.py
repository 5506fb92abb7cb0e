"""`--profile local`: jobs of a machine with GPUs, counted by Snakemake."""

from __future__ import annotations

import json

import pytest
from workflow.project import Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

# A logger plugin of snakemake that writes down the GPUs that every job asks for.
PLUGIN = """\
import json, os
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent


class LogHandler(LogHandlerBase):
    writes_to_stream = writes_to_file = needs_rulegraph = False
    has_filter = has_formatter = True

    def emit(self, record):
        if getattr(record, "event", None) == LogEvent.JOB_INFO:
            with open(os.environ["TLORA_TEST_GPUS"], "a", encoding="utf-8") as file:
                asked = [record.rule_name, dict(record.resources).get("gpu", 0)]
                file.write(json.dumps(asked) + "\\n")
"""


def asked(project: Project, devices: str) -> dict[str, int]:
    """Return the GPUs that each rule's jobs get on a machine with these."""
    folder, record = project.tools / "snakemake_logger_plugin_gpus", project.tools / "gpus"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(PLUGIN)
    record.unlink(missing_ok=True)
    project.environment |= {"TLORA_TEST_GPUS": str(record), "CUDA_VISIBLE_DEVICES": devices}
    command = ["snakemake", "--configfile", "config/mini.yaml", "--profile", "local"]
    output = project.run([*command, "--dry-run", "--logger", "gpus"])
    assert "Using profiles local" in output
    return dict(json.loads(line) for line in record.read_text().splitlines())


def test_jobs_ask_for_their_gpus(fresh: Project) -> None:
    """Training for those of its model, other heavy jobs for one, light ones for none."""
    fresh.append("config/models/tiny.yaml", "gpus: 4\n")
    found = asked(fresh, "0,1,2,3,5")
    heavy = dict.fromkeys(("calibrate", "initialize", "check", "generate"), 1)
    assert {rule: count for rule, count in found.items() if count} == {"train": 4, **heavy}
    # No job asks snakemake for more than there are; the job itself says that it lacks some.
    assert asked(fresh, "0,1")["train"] == 2
    # Without a GPU nothing is counted, or no job could start.
    assert asked(fresh, "")["train"] == 4
