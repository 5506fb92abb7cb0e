"""The whole chain on an encoder-decoder model, for every method that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from contract.grid import PRESET, Grid, every_method, make_grid

from tlora.artefact import read_json
from tlora.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Ablations of a method (`extends`) differ in what does not depend on the model's family.
NAMES = sorted(
    path.stem
    for path in (ROOT / "config" / "methods").glob("*.yaml")
    if "\nextends:" not in f"\n{path.read_text()}"
)
# EVA's own preparation takes causal models only.
REFUSED = ("eva",)
PROJECTIONS = PRESET.replace("{{rank: 4,", "{{target_modules: [q, k, v, o, wi, wo], rank: 4,")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    preset = (
        PROJECTIONS + "  - {{benchmarks: [arithmetic], set: {{limit: 8, max_new_tokens: 8}}}}\n"
    )
    methods = [name for name in every_method(ROOT) if name not in REFUSED]
    return make_grid(ROOT, tmp_path_factory.mktemp("t5"), preset, methods=methods, family="t5")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_trains_passes_the_gate_and_is_scored(t5: Grid, name: str) -> None:
    cell = t5.cell(name)
    assert read_json(t5.make(cell.units["check"])) == {"passed": True, "reasons": []}
    rows = (t5.path(cell.units["train"]).parent / "log.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert len(losses) == 10 and losses[-1] < losses[0]
    score = read_json(t5.make(next(iter(cell.scores.values()))))
    assert score["n"] == 8 and "failed" not in score


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_lacks_it_says_so(tmp_path: Path, name: str) -> None:
    """Before any job: the plan itself refuses."""
    with pytest.raises(UserError, match=f"'{name}': .*encoder-decoder"):
        make_grid(ROOT, tmp_path, PROJECTIONS, methods=["adalora", name], family="t5")
