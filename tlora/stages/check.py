"""The adapter gate: every form of the trained weights must be the model that was trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlora.artefact import check_files, read_json, write_json
from tlora.base_model import load_model
from tlora.errors import UserError
from tlora.peft_folder import CONFIG, WEIGHTS, read_config, read_tensors, scaling
from tlora.probe import digest_of, held_out, probe

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Answers = dict[str, "Tensor"]

EXACT = 1e-4
"""Largest difference of logits in float32, as a share of their largest magnitude."""
OF_EFFECT = 0.05
"""Largest difference as a share of what training changed: a scaling off by a tenth is found."""
EFFECT = 1e-5
"""Least that training must change, as a share of the logits' largest magnitude."""
NOISE = 3.0
"""Largest difference in bfloat16 (root mean square), in units of what bfloat16 itself changes."""


def check(spec: dict, inputs: dict[str, Path], out: Path, place: dict[str, Any]) -> None:
    """Write figures.json and check.json: {"passed", "reasons"}.

    Compared on held-out prompts are the model as training left it, the saved adapter loaded again,
    the exported adapter on the unmodified base model, and the merged model. In float32 the logits
    agree within `EXACT` and the greedy tokens are equal. In bfloat16 the trained model is compared
    within `NOISE` times the difference that bfloat16 makes to the reloaded model, and the adapters
    among each other in float32. Ranks and scalings are those that were allocated, frozen weights
    those of the initialisation. A run that fails is no error: it is shown as failed, not scored.
    One whose training failed is not looked at: check.json says under `failed` why.

    Raises
    ------
    UserError
        Files that are not what their manifests vouch for, or no sample to compare on.
    """
    from safetensors.torch import load_file

    failed = read_json(inputs["train"]).get("failed")
    if failed is not None:
        write_json(out / "figures.json", {"comparisons": [], "noise": None})
        write_json(out / "check.json", {"passed": False, "reasons": [failed], "failed": failed})
        return
    samples = held_out(inputs["prepare"])
    if not samples:
        raise UserError(f"{inputs['prepare']}: no sample: expected one to compare on")
    for name in ("train", "export"):
        check_files(inputs[name].parent / "weights", read_json(inputs[name])["files"])
    verdict = Verdict()
    _check_files(inputs, verdict)
    answers = {"trained": load_file(inputs["train"].parent / "probe.safetensors")}
    kinds = ("float32",) if spec["model"]["dtype"] == "float32" else ("float32", "bfloat16")
    for dtype in kinds:
        for name, model in _forms({**spec["model"], "dtype": dtype}, inputs, place, verdict):
            answers[f"{name} {dtype}"] = probe(model, samples)
    if verdict.loaded:
        _compare(answers, kinds, verdict)
    write_json(out / "figures.json", {"comparisons": verdict.figures, "noise": verdict.noise})
    reasons = verdict.reasons
    for reason in reasons:
        logger.error("adapter gate: %s", reason)
    write_json(out / "check.json", {"passed": not reasons, "reasons": reasons})


class Verdict:
    """What was compared, and why the run fails, if it does."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.noise: float | None = None
        self.loaded = True

    def fail(self, reason: str) -> None:
        """Note a reason to fail."""
        self.reasons.append(reason)

    def at_most(self, what: str, value: float, limit: float, unit: str) -> None:
        """Note a figure; above its limit the run fails."""
        good = value <= limit
        self.figures.append({"what": what, "value": value, "limit": limit, "unit": unit})
        if not good:
            self.fail(f"{what}: {value:.1e} of {unit}, at most {limit:.1e}")


def _forms(
    identity: dict[str, Any], inputs: dict[str, Path], place: dict[str, Any], verdict: Verdict
) -> Iterator[tuple[str, Any]]:
    """Yield the base model and every form of the trained one, with names."""
    from peft import PeftModel

    from tlora.adapter import load_initial

    trained = inputs["train"].parent / "weights"
    exported = inputs["export"].parent / "weights"
    base = load_model(identity, place)
    yield "base", base
    try:
        if not (trained / CONFIG).is_file():
            yield "reloaded", load_model(identity, {**place, "model": str(trained)})
        else:
            if "initialize" in inputs:
                base = load_initial(base, inputs["initialize"].parent, ()).unload()
            yield "reloaded", PeftModel.from_pretrained(base, str(trained))
        if read_json(inputs["export"])["form"] == "model":
            yield "merged", load_model(identity, {**place, "model": str(exported)})
            return
        model = PeftModel.from_pretrained(load_model(identity, place), str(exported))
        yield "exported", model
        yield "merged", model.merge_and_unload(safe_merge=True)
    except (UserError, OSError, ValueError, RuntimeError) as error:
        verdict.loaded = False
        verdict.fail(f"does not load: {' '.join(str(error).split())[:200]}")


def _compare(answers: dict[str, Answers], kinds: tuple[str, ...], verdict: Verdict) -> None:
    """Compare the forms of the model with the one that was trained."""
    forms = [name for name in ("reloaded", "exported", "merged") if f"{name} float32" in answers]
    native = kinds == ("float32",)
    # In bfloat16 the trained model is no reference for float32: the reloaded one is.
    reference = "trained" if native else "reloaded float32"
    truth, base = answers[reference], answers["base float32"]
    effect = largest(truth, base)
    verdict.figures.append({"what": "effect of training", "value": effect, "unit": "logits"})
    if not effect >= EFFECT:
        verdict.fail(f"changes the base model's logits by {effect:.1e}, expected {EFFECT} or more")
    for name in forms:
        exported_rounded = not native and name == "merged" and "exported" not in forms
        if f"{name} float32" == reference or exported_rounded:
            continue
        found, what = answers[f"{name} float32"], f"{name} against {reference}"
        distance = largest(found, truth)
        verdict.at_most(what, distance, EXACT, "the logits")
        if effect > 0:
            verdict.at_most(what, distance / effect, OF_EFFECT, "what training changed")
        if parted := parts(found, truth):
            verdict.fail(f"{what}: {parted} prompts get other greedy tokens")
    if native:
        return
    noise = verdict.noise = root_mean_square(
        answers["reloaded bfloat16"], answers["reloaded float32"]
    )
    for name in forms:
        distance = root_mean_square(answers[f"{name} bfloat16"], answers["trained"])
        verdict.at_most(f"{name} against trained", distance / noise, NOISE, "bfloat16's noise")


def largest(found: Answers, expected: Answers) -> float:
    """Return the largest difference of logits over their largest magnitude."""
    keys = [key for key in expected if key.startswith("logits.")]
    scale = max(float(expected[key].abs().max()) for key in keys)
    return max(float((found[key] - expected[key]).abs().max()) for key in keys) / scale


def root_mean_square(found: Answers, expected: Answers) -> float:
    """Return the root mean square of the differences of logits."""
    keys = [key for key in expected if key.startswith("logits.")]
    total = sum(float((found[key] - expected[key]).double().square().sum()) for key in keys)
    return math.sqrt(total / sum(expected[key].numel() for key in keys))


def parts(found: Answers, expected: Answers) -> int:
    """Return for how many prompts the greedy tokens differ, ties of float32 aside."""
    parted = 0
    for key in expected:
        if not key.startswith("tokens."):
            continue
        one, other = found[key].tolist(), expected[key].tolist()
        margins = expected[key.replace("tokens.", "margins.")].tolist()
        scale = float(expected[key.replace("tokens.", "logits.")].abs().max())
        for token, wanted, margin in zip(one, other, margins, strict=False):
            if token != wanted:
                parted += margin > EXACT * scale
                break
        else:
            parted += len(one) != len(other)
    return parted


def _check_files(inputs: dict[str, Path], verdict: Verdict) -> None:
    """Compare ranks, scalings and frozen weights with what they were to be."""
    trained = inputs["train"].parent / "weights"
    if not (trained / CONFIG).is_file():
        return
    saved = read_tensors(trained / WEIGHTS)
    for name, digest in read_json(inputs["train"])["frozen"].items():
        values = (saved[key].numbers() for key in sorted(saved) if f".{name}." in key)
        if digest_of(values) != digest:
            verdict.fail(f"trained: {name}: changed, though it is frozen")
    if "initialize" not in inputs:
        return
    start = inputs["initialize"].parent
    expected = _realised(start, read_tensors(start / WEIGHTS))
    if "allocate" in inputs:
        modules = read_json(inputs["allocate"])["modules"]
        expected = {
            name: (module["rank"], module["scaling"])
            for name, module in modules.items()
            if module["rank"] > 0
        }
    _same(_realised(trained, saved), expected, (1,), "trained", verdict)
    exported = inputs["export"].parent / "weights"
    if (exported / CONFIG).is_file():
        realised = _realised(exported, read_tensors(exported / WEIGHTS))
        _same(realised, expected, (1, 2), "exported", verdict)


def _realised(folder: Path, tensors: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Return rank and scaling of every module of an adapter."""
    config = read_config(folder)
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = (tensor.shape[0], scaling(config, module))
    return found


def _same(
    found: dict[str, tuple[int, float]],
    expected: dict[str, tuple[int, float]],
    factors: tuple[int, ...],
    what: str,
    verdict: Verdict,
) -> None:
    """Compare ranks (up to a factor) and scalings of all modules."""
    if found.keys() != expected.keys():
        name = min(found.keys() ^ expected.keys())
        verdict.fail(f"{what}: {name}: has an adapter, or lacks one, against the allocation")
        return
    for name, (rank, factor) in expected.items():
        if found[name][0] not in [rank * times for times in factors]:
            verdict.fail(f"{what}: {name}: rank {found[name][0]}, allocated {rank}")
            return
        if not math.isclose(found[name][1], factor, rel_tol=1e-6):
            verdict.fail(f"{what}: {name}: scaling {found[name][1]}, allocated {factor}")
            return
