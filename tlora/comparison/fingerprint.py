"""What every run was made with, and in what the rows of a table differ.

A *fingerprint* is a run's settings, data, decoding, versions and tuning budget, in groups:

`base`: weights and precision; `data`: source, prompt and the SHA-256 of the training samples (their
tokens and the mask of the loss); `training`: hyperparameters, steps, samples and tokens seen;
`evaluation`: data, prompt, decoding and scorer of every benchmark; `versions`: of the packages that
trained; `tuning`: the budget of trials. Two groups are told and never held against a row: `method`
(what a method is: its options, its parameters, the values its trials chose) and `machine`.

A row is held against the value that most rows have; where two values are equally frequent, against
the baseline's. What differs is of one of these kinds:

- `unequal`: nobody asked for it; the row is not comparable (footnote, refused by `strict`);
- `tuned`, `own`, `varied`: by trials, by `hyperparameters: own` or by `vary`: on purpose;
- `machine`: the costs are not comparable, the scores are.

What a run does not have (the rank of full fine-tuning), or does not tell, is not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlora.comparison.collect import Comparison, Row, Run, Section
from tlora.errors import UserError

UNEQUAL = "unequal"

ADAPTER = ("rank", "lora_alpha", "target_modules")
"""Settings that full fine-tuning does not have."""

TOLD = ("method", "machine", "counts")
"""Groups that no row is refused for."""

ON_PURPOSE = {"tuned": "tuned", "own": "the method's own", "varied": "varied"}

DATA = (("data",), ("training", "max_length"), ("base", "weights"))
"""What the training samples follow from."""

SEEN = (*DATA, ("training", "batch_size"), ("training", "epochs"))
"""What steps, samples and tokens follow from."""

FOLLOWS = {
    ("data", "sha256"): DATA,
    ("training", "steps"): SEEN,
    ("training", "samples"): SEEN,
    ("training", "tokens"): SEEN,
}

BY_SEED = (("training", "tokens"),)
"""What differs between seeds: which samples the last, ragged batch leaves out."""

WORDS = {
    ("base", "weights"): "base weights",
    ("data", "sha256"): "training samples (tokens and loss mask)",
    ("data", "prompt"): "training prompt",
    ("data", "source"): "training data",
    ("training", "lora_alpha"): "alpha",
    ("training", "max_grad_norm"): "gradient norm at most",
    ("training", "max_length"): "tokens of a sample at most",
    ("training", "tokens"): "tokens seen",
    ("training", "samples"): "samples seen",
    ("training", "warmup_ratio"): "warm-up",
    ("tuning", "trials"): "tuning trials",
    ("tuning", "failed"): "failed tuning trials",
    ("tuning", "items"): "items of the validation split",
    ("tuning", "metric"): "trials compared by",
    ("tuning", "seed"): "seed of the trials",
}

Key = tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """One thing in which a row is not like the others.

    Attributes
    ----------
    place
        Of the row in its section.
    key
        Group and name, joined by "/".
    what, own, others
        In words: the key, the row's value, and the others'.
    agreed
        Whether all other rows have the value `others`; otherwise most of them.
    kind
        `unequal`, `tuned`, `own`, `varied` or `machine`.
    """

    place: int
    key: str
    what: str
    own: str
    others: str
    agreed: bool
    kind: str

    @property
    def text(self) -> str:
        """What a footnote says."""
        return f"{self.what} {self.own}, {'others' if self.agreed else 'most'} {self.others}"


def fingerprint(run: Run) -> dict[str, dict[str, Any]]:
    """Return what a run was made with, by group; what it does not have or tell is left out."""
    recipe = run.recipe
    trained, generated = recipe.get("train", {}), recipe.get("generate", {})
    model = trained.get("model") or next((one["model"] for one in generated.values()), {})
    found: dict[str, dict[str, Any]] = {"base": _base(model)}
    if not run.base:
        found |= _training(run)
    found["evaluation"] = {name: _evaluation(run, name) for name in [*generated, *run.scores]}
    return {group: values for group, values in found.items() if values}


def _base(model: Mapping[str, Any]) -> dict[str, Any]:
    if not model:
        return {}
    weights = f"{model['hub']}@{model['revision']}" if "hub" in model else model["sha256"]
    return {"weights": weights, "precision": model["dtype"]}


def _training(run: Run) -> dict[str, dict[str, Any]]:
    """Return the groups of a run that was trained."""
    recipe, card, told = run.recipe, run.card, run.training or {}
    options = {
        key: value
        for key, value in run.settings.items()
        if key.startswith("options.") or isinstance(value, dict)
    }
    own = {key: value for key, value in run.settings.items() if key not in options}
    if "train" in recipe:
        if recipe["train"]["rank"] is None:
            own = {key: value for key, value in own.items() if key not in ADAPTER}
        if not any("samples" in one for one in _initialization(run).values()):
            own.pop("calibration_samples", None)
    data = {key: card[key] for key in ("source", "prompt") if key in card}
    data |= {"options": card.get("data", {}), "files": card.get("sources", {})}
    if "train.parquet" in card.get("sha256", {}):
        data["sha256"] = card["sha256"]["train.parquet"]
    seen = {key: told[key] for key in ("steps", "samples", "tokens") if key in told}
    implementation = recipe.get("train", {}).get("implementation")
    return {
        "data": data,
        "training": own | seen,
        "counts": {key: card[key] for key in ("counts", "truncated") if key in card},
        "versions": dict(told.get("versions", {})),
        "method": {
            **({"implementation": implementation} if implementation else {}),
            **({"options": options} if options else {}),
            **{key: told[key] for key in ("trainable_parameters",) if key in told},
        },
        "machine": {key: told[key] for key in ("device", "processes") if key in told},
    }


def _initialization(run: Run) -> dict[str, dict[str, Any]]:
    """Return the specs of what came before training, without those that read no samples."""
    names = ("prepare", "train", "generate", "score")
    return {
        name: one
        for name, one in run.recipe.items()
        if name not in names and isinstance(one, dict) and one.get("samples") is not None
    }


def _evaluation(run: Run, name: str) -> dict[str, Any]:
    generated = run.recipe.get("generate", {}).get(name)
    scored = run.recipe.get("score", {}).get(name)
    found: dict[str, Any] = {}
    if generated:
        found |= {**generated["benchmark"], "prompt": generated["prompt"]}
        found |= {"files": generated["files"], "backend": generated["backend"]}
    if scored:
        found |= {"scorer": scored["implementation"], "scorer_options": scored["options"]}
    if name in run.scores:
        found["items"] = run.scores[name].n
    return found


def tuning(row: Row) -> dict[str, Any]:
    """Return the tuning budget of a row; {} where nothing was tuned."""
    choice = row.choice
    if choice is None:
        return {}
    scores = [trial.scores.get("validation") for trial in choice.trials]
    return {
        "trials": len(choice.tried),
        "failed": sum(value is None for value in choice.values),
        "metric": choice.metric,
        "seed": sorted({trial.seed for trial in choice.trials if trial.seed is not None}),
        "items": max((score.n for score in scores if score is not None), default=0),
    }


def trained_seeds(row: Row) -> list[int]:
    """Return the seeds whose runs have all their numbers."""
    return [run.seed for run in row.runs if run.seed is not None and not run.failures]


def _flat(groups: Mapping[str, Any], above: Key = ()) -> dict[Key, Any]:
    """Return the values of nested mappings by the keys on the way to them."""
    found: dict[Key, Any] = {}
    for name, value in groups.items():
        if isinstance(value, dict):
            found |= _flat(value, (*above, str(name)))
        else:
            found[*above, str(name)] = value
    return found


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def differences(
    section: Section, baseline: str | None = None, labels: Mapping[str, str] | None = None
) -> list[Difference]:
    """Return in what the rows of a table differ, row by row.

    Parameters
    ----------
    section
        The rows.
    baseline
        The method whose value counts where two are equally frequent; without it the first row's.
    labels
        What people call the benchmarks.
    """
    prints = [values_of(row) for row in section.rows]
    found: list[Difference] = []
    for key in dict.fromkeys(key for values in prints for key in values):
        if key[0] in TOLD and key[0] != "machine":
            continue
        found += _unlike(section, prints, key, baseline, labels or {})
    kinds = {(one.place, one.key): one.kind for one in found}
    found = [
        one if kind == one.kind else Difference(**{**vars(one), "kind": kind})
        for one in found
        for kind in [_inherited(one, kinds)]
    ]
    order = {"/".join(key): number for number, key in enumerate(_known(prints))}
    # two seeds may say the same
    return sorted(dict.fromkeys(found), key=lambda one: (one.place, order[one.key]))


def _known(prints: list[dict[Key, Any]]) -> list[Key]:
    return list(dict.fromkeys(_plain(key) for values in prints for key in values))


def _plain(key: Key) -> Key:
    """Return a key without the seed."""
    return key[:2] if key[:2] in BY_SEED else key


def values_of(row: Row) -> dict[Key, list[Any]]:
    """Return the distinct values of a row's runs by key; more than one where they differ."""
    values: dict[Key, dict[str, Any]] = {}
    for run in row.runs:
        if "" in run.failures:
            continue
        for key, value in _flat(fingerprint(run)).items():
            slot = (*key, str(run.seed)) if key in BY_SEED else key
            values.setdefault(slot, {})[_canonical(value)] = value
    found = {key: list(distinct.values()) for key, distinct in values.items()}
    if not row.base:
        found["seeds",] = [trained_seeds(row)]
        budget = tuning(row) or {"trials": 0}
        found |= {("tuning", key): [value] for key, value in budget.items()}
    return found


def _unlike(
    section: Section,
    prints: list[dict[Key, list[Any]]],
    key: Key,
    baseline: str | None,
    labels: Mapping[str, str],
) -> list[Difference]:
    """Return the rows that have another value of one key than the others."""
    having = {place: values[key] for place, values in enumerate(prints) if key in values}
    texts = {place: [_canonical(value) for value in values] for place, values in having.items()}
    flat = [text for found in texts.values() for text in found]
    if len(set(flat)) < 2:
        return []
    methods = [row.method for row in section.rows]
    first = methods.index(baseline) if baseline in methods else min(having)
    preferred = texts.get(first, flat)[0]
    # the most frequent; of two equally frequent ones the baseline's, then the first
    usual = max(flat, key=lambda text: (flat.count(text), text == preferred))
    holders = [place for place, found in texts.items() if found == [usual]]
    other = next(v for place in having for v in having[place] if _canonical(v) == usual)
    plain = _plain(key)
    return [
        Difference(
            place=place,
            key="/".join(plain),
            what=_words(plain, labels),
            own=" or ".join(map(shown, having[place])),
            others=shown(other),
            agreed=len(holders) == len(having) - 1,
            kind=_kind(section, place, holders, plain),
        )
        for place in having
        if texts[place] != [usual]
    ]


def _kind(section: Section, place: int, holders: list[int], key: Key) -> str:
    """Return whether somebody asked for a row, or for all the others, to be different."""
    if key[0] == "machine":
        return "machine"
    for kind in ON_PURPOSE:
        asked = [place, *holders]
        meant = [key[-1] in _asked(section.rows[one], kind) for one in asked]
        if key[0] in ("training", "data") and (meant[0] or (meant[1:] and all(meant[1:]))):
            return kind
    return UNEQUAL


def _asked(row: Row, kind: str) -> list[str]:
    if kind == "tuned":
        return sorted({key for tried in (row.choice.tried if row.choice else ()) for key in tried})
    return row.runs[0].recipe.get(kind, []) if row.runs else []


def _inherited(one: Difference, kinds: Mapping[tuple[int, str], str]) -> str:
    """Return the kind of what a difference follows from, its own where it follows from none."""
    causes = FOLLOWS.get(tuple(one.key.split("/")))
    if causes is None or one.kind != UNEQUAL:
        return one.kind
    found = [
        kind
        for (place, key), kind in kinds.items()
        if place == one.place
        and key not in {"/".join(follower) for follower in FOLLOWS}
        and any(tuple(key.split("/"))[: len(cause)] == cause for cause in causes)
    ]
    return UNEQUAL if not found or UNEQUAL in found else found[0]


def _words(key: Key, labels: Mapping[str, str]) -> str:
    if key in WORDS:
        return WORDS[key]
    if key[0] == "evaluation":
        rest = " ".join(key[2:]).replace("_", " ")
        return f"{labels.get(key[1], key[1])}: {rest}"
    if key[:2] in (("data", "options"), ("data", "files")):
        return f"training data: {key[-1].replace('_', ' ')}"
    return key[-1].replace("_", " ")


def shown(value: Any) -> str:
    """Return a value as a footnote has it; long texts and checksums by 8 digits of SHA-256."""
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:8]
    if len(value) > 60 or "\n" in value:
        return f"SHA-256 {hashlib.sha256(value.encode()).hexdigest()[:8]}"
    return value


def footnotes(found: list[Difference], place: int) -> tuple[str, str]:
    """Return what makes a row not comparable, and what differs on purpose; "" for nothing."""
    mine = [one for one in found if one.place == place]
    meant = [f"{one.text} ({ON_PURPOSE[one.kind]})" for one in mine if one.kind in ON_PURPOSE]
    return "; ".join(one.text for one in mine if one.kind == UNEQUAL), "; ".join(meant)


GROUPS = {
    "base": "base weights and precision",
    "data": "training data and prompt",
    "training": "hyperparameters, steps, samples and tokens seen",
    "versions": "versions of the packages that trained",
    "evaluation": "test data, prompts, decoding and scorers",
}
"""What stands in the groups, in words."""


def compared(section: Section) -> str:
    """Return in words what all trained runs of a table tell, and so can be held against them."""
    runs = [run for row in section.rows if not row.base for run in row.runs if not run.failures]
    told = [
        {group for group, values in fingerprint(run).items() if _flat(values)}
        - (set() if run.recipe else {"evaluation"})
        for run in runs
    ]
    groups = set.intersection(*told) if told else set()
    return "; ".join(
        [text for group, text in GROUPS.items() if group in groups] + ["tuning budget"]
    )


def remarks(section: Section, labels: Mapping[str, str], baseline: str | None = None) -> list[str]:
    """Return what holds for a table as a whole: parameters, prompts and machines."""
    rows = [row for row in section.rows if not row.base]
    lines = []
    counts = {row.label: row.trainable_parameters for row in rows}
    known = {label: count for label, count in counts.items() if count is not None}
    if len(set(known.values())) > 1:
        least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        lines.append(
            "By the nature of the methods trainable parameters differ: from "
            f"{known[least]:,} ({least}) to {known[most]:,} ({most})."
        )
    for name in section.benchmarks:
        prompts = {
            (run.card.get("prompt"), run.recipe["generate"][name]["prompt"])
            for row in rows
            for run in row.runs
            if run.card and name in run.recipe.get("generate", {})
        }
        unlike = [evaluated for trained, evaluated in prompts if trained != evaluated]
        if unlike:
            whose = "the evaluation harness has its own" if "" in unlike else "it has its own"
            lines.append(f"{labels.get(name, name)}: the prompt is not that of training: {whose}.")
    machines = [one for one in differences(section, baseline, labels) if one.kind == "machine"]
    lines += [
        f"Costs of {section.rows[one.place].label} are from another machine: {one.text}."
        for one in machines
    ]
    return lines


def check(comparison: Comparison, baseline: str | None = None) -> None:
    """Refuse tables whose rows are not comparable (`strict: true`).

    Raises
    ------
    UserError
        Naming the first row, the key, its value and the others', and how many more there are.
    """
    found = [
        (section, one)
        for section in comparison.sections
        for one in differences(section, baseline, comparison.labels)
        if one.kind == UNEQUAL
    ]
    if found:
        section, one = found[0]
        row = section.rows[one.place]
        more = f"; {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            f"strict: {section.model}/{section.task}/{row.method}: {one.key}: {one.own}: expected "
            f"{one.others}, as {'the other' if one.agreed else 'most'} rows have{more}"
        )


def to_json(comparison: Comparison, baseline: str | None = None) -> dict[str, Any]:
    """Return all fingerprints and differences as plain builtins, for fingerprints.json.

    `digest` is of all that rows are held against but seeds and tokens: runs with equal digests are
    comparable, also between comparisons. Tuned values are part of it.
    """
    sections = []
    for section in comparison.sections:
        found = differences(section, baseline, comparison.labels)
        rows = []
        for place, row in enumerate(section.rows):
            runs = []
            for run in row.runs:
                groups = fingerprint(run)
                runs.append(
                    {
                        "seed": run.seed,
                        "spec_id": run.spec_id,
                        "digest": digest(groups | {"tuning": tuning(row)}),
                        "fingerprint": groups,
                    }
                )
            mine = [{k: v for k, v in vars(d).items() if k != "place"} for d in found]
            mine = [one for one, d in zip(mine, found, strict=True) if d.place == place]
            rows.append(
                {"method": row.method, "base": row.base, "seeds": trained_seeds(row)}
                | {"tuning": tuning(row), "differences": mine, "runs": runs}
            )
        sections.append({"model": section.model, "task": section.task, "rows": rows})
    return {"preset": comparison.preset, "sections": sections}


def digest(groups: Mapping[str, Any]) -> str:
    """Return 12 hex digits of what must be equal for two runs to be comparable."""
    kept = {
        "/".join(key): value
        for key, value in _flat(groups).items()
        if key[0] not in TOLD and key not in BY_SEED
    }
    return hashlib.sha256(_canonical(kept).encode()).hexdigest()[:12]
