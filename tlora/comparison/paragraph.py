"""A methods section for the paper of whoever uses a comparison, from what its runs were made with.

Every clause is read off the fingerprints, the data cards, the trials and the tables, so it says
what was done, also where that is not what was meant: unequal rows, failed runs, nothing tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tlora.artefact import read_json
from tlora.comparison import tables
from tlora.comparison.collect import Comparison, Row, Section
from tlora.comparison.fingerprint import (
    UNEQUAL,
    Key,
    differences,
    shown,
    trained_seeds,
    values_of,
)
from tlora.comparison.tables import DRAWS, Record

Known = dict[int, dict[Key, list[Any]]]
"""The values of every row's runs by the row's `id`: they are asked for often."""

ENGINES = {"transformers": "Hugging Face transformers", "vllm": "vLLM"}

TESTS = {
    "crossed": "t tests over seeds and items, both random and crossed, with Satterthwaite's "
    "degrees of freedom",
    "mcnemar": "McNemar's exact test on the items of one run each, which says nothing of other "
    "seeds",
    "items": "paired t tests on the items of one run each, which say nothing of other seeds",
}


def methods(comparison: Comparison, found: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return title and paragraphs for every table of a comparison.

    Parameters
    ----------
    comparison
        What was run.
    found
        The records of table.csv.
    """
    return [
        (section.title, _section(section, mine, comparison.labels))
        for section, mine in tables.split(comparison, list(found))
    ]


def to_markdown(comparison: Comparison, found: Sequence[Record]) -> str:
    """Return the methods section as Markdown."""
    lines = [f"# Methods: {tables.md(comparison.preset)}", ""]
    for title, paragraphs in methods(comparison, found):
        lines += [f"## {tables.md(title)}", ""]
        lines += [line for text in paragraphs for line in (tables.md(text), "")]
    return "\n".join(lines)


def to_latex(comparison: Comparison, found: Sequence[Record]) -> str:
    """Return the methods section for `\\input` in a LaTeX document; it needs no package."""
    lines = []
    for title, paragraphs in methods(comparison, found):
        # checksums and names of modules cannot be broken
        lines += [f"\\subsection*{{{tables.tex(title)}}}", "{\\sloppy"]
        lines += [f"{tables.tex(text)}\\par" for text in paragraphs]
        lines += ["}", ""]
    return "\n".join(lines)


def _section(section: Section, found: Sequence[Record], labels: Mapping[str, str]) -> list[str]:
    rows = [row for row in section.rows if not row.base]
    known = {id(row): values_of(row) for row in section.rows}
    if not rows:
        return [_evaluation(known, section, labels)]
    against = next((record["method"] for record in found if record["baseline"]), None)
    return [
        text
        for text in (
            _training(known, section, rows),
            _tuning(known, rows),
            _evaluation(known, section, labels),
            _statistics(section, found, labels),
            _software(known, rows),
            _exceptions(section, rows, against, labels),
        )
        if text
    ]


# ---------------------------------------------------------------- what runs agree in


def _said(known: Known, rows: Sequence[Row], *key: str, form: Callable[[Any], str] = shown) -> str:
    """Return a value, or every value and who has it; "" where no run tells."""
    whose: dict[str, list[str]] = {}
    for row in rows:
        values = known[id(row)].get(key, [])
        text = " or ".join(form(value) for value in values)
        if text:
            whose.setdefault(text, []).append(row.label)
    if len(whose) < 2:
        return next(iter(whose), "")
    usual = max(whose, key=lambda text: len(whose[text]))
    rest = [f"{text} for {_list(names)}" for text, names in whose.items() if text != usual]
    alone = len(whose[usual]) == 1
    first = f"{usual} for {whose[usual][0]}" if alone else usual
    return f"{first} ({'; '.join(rest)})"


def _list(texts: Sequence[str]) -> str:
    """Return words as a list: "a, b and c"; with semicolons where words contain commas."""
    *most, last = texts
    sign = "; " if any("," in text for text in texts) else ", "
    return f"{sign.join(most)} and {last}" if most else last


def _quoted(text: str) -> str:
    return "“" + text.replace("\n", "\\n") + "”"


def _values(known: Known, row: Row, *key: str) -> list[Any]:
    return known[id(row)].get(key, [])


# ---------------------------------------------------------------- paragraphs


def _training(known: Known, section: Section, rows: list[Row]) -> str:
    cards = [run.card for row in rows for run in row.runs if run.card]
    sizes = list(dict.fromkeys(card["counts"]["train"] for card in cards if "counts" in card))
    weights = _said(known, rows, "base", "weights", form=_weights)
    precision = _said(known, rows, "base", "precision")
    base = "; ".join(part for part in (weights, precision) if part)
    sentences = [
        f"We fine-tuned {section.model_label}{f' ({base})' if base else ''} on "
        f"{section.task_label}"
        + (f" (n = {' or '.join(f'{size:,}' for size in sizes)} training samples)" if sizes else "")
        + f" with {_list([_with_parameters(row) for row in rows])}."
    ]
    sentences += _data(known, rows, cards) + _recipe(known, rows) + _adapters(known, rows)
    seeds: dict[str, list[str]] = {}
    for row in rows:
        count = ", ".join(map(str, trained_seeds(row))) or "none"
        seeds.setdefault(count, []).append(row.label)
    if len(seeds) == 1:
        text = next(iter(seeds))
        word = "seed" if "," not in text else "seeds"
        sentences.append(f"Every method was trained with {word} {text}.")
    else:
        told = "; ".join(f"{text} for {_list(names)}" for text, names in seeds.items())
        sentences.append(f"The seeds with all their results were {told}.")
    return " ".join(sentences)


def _weights(value: str) -> str:
    repository, at, revision = value.partition("@")
    return f"{repository} at revision {revision[:12]}" if at else f"weights SHA-256 {value[:12]}"


def _with_parameters(row: Row) -> str:
    count = row.trainable_parameters
    return row.label if count is None else f"{row.label} ({count:,} trainable parameters)"


def _data(known: Known, rows: list[Row], cards: list[dict[str, Any]]) -> list[str]:
    sentences = []
    source = _said(known, rows, "data", "source")
    if source:
        keys = dict.fromkeys(key for row in rows for key in known[id(row)])
        options = [key for key in keys if key[:2] == ("data", "options")]
        told = [f"{' '.join(key[2:])} {_said(known, rows, *key)}" for key in options]
        digest = _said(known, rows, "data", "sha256")
        told += [f"SHA-256 of the tokenised samples {digest}"] if digest else []
        sentences.append(f"The training data is the source {source}" + _bracket(told) + ".")
    prompt = _said(known, rows, "data", "prompt", form=_quoted)
    if prompt:
        sentences.append(
            f"Prompts follow the template {prompt}; the loss is over the tokens of the response "
            "only."
        )
    length = _said(known, rows, "training", "max_length")
    if length:
        cut = {
            f"{card['truncated']['train']:,} of {card['counts']['train']:,}"
            for card in cards
            if "truncated" in card
        }
        sentences.append(
            f"Samples have at most {length} tokens"
            + (f" ({' or '.join(sorted(cut))} were cut)" if cut else "")
            + "."
        )
    return sentences


def _bracket(texts: Sequence[str]) -> str:
    return f" ({', '.join(texts)})" if texts else ""


def _recipe(known: Known, rows: list[Row]) -> list[str]:
    def said(key: str, text: str, form: Callable[[Any], str] = shown) -> list[str]:
        value = _said(known, rows, "training", key, form=form)
        return [text.format(value)] if value else []

    counts = [
        f"{_span(rows, key)} {key}" for key in ("steps", "samples", "tokens") if _span(rows, key)
    ]
    told = said("batch_size", "global batch size {}")
    told += said("epochs", "epochs {}")
    told += [f"{', '.join(counts)} a run, prompts included"] if counts else []
    told += said("schedule", "learning-rate schedule {}")
    told += said("warmup_ratio", "warm-up over {} of the steps", lambda value: f"{value:.0%}")
    told += said("weight_decay", "weight decay {}")
    told += said("max_grad_norm", "gradients clipped at norm {}")
    if not told:
        return []
    return [
        f"Training: {'; '.join(told)}; AdamW of Hugging Face's Trainer but where a method brings "
        "an optimizer of its own."
    ]


def _span(rows: list[Row], key: str) -> str:
    """Return the least and the most of a number of train.json over all runs."""
    numbers = [round(value) for row in rows for value in row.training(key)]
    if not numbers:
        return ""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _adapters(known: Known, rows: list[Row]) -> list[str]:
    having = [row for row in rows if _values(known, row, "training", "rank")]
    without = [row.label for row in rows if row not in having]
    sentences = []
    if having:
        sentences.append(
            f"The rank budget of adapters is {_said(known, having, 'training', 'rank')} a target "
            f"module, alpha {_said(known, having, 'training', 'lora_alpha')}, the targets are "
            f"{_said(known, having, 'training', 'target_modules')}"
            + (f"; {_list(without)} has no adapter" if without else "")
            + "."
        )
    for what in ("rank", "scaling"):
        allocating = [row.label for row in having if _allocated(row, what)]
        if allocating:
            sentences.append(f"The {what}s of {_list(allocating)} differ by module.")
    reading: dict[str, list[str]] = {}
    for row in rows:
        used = {
            (one["samples"], one["seed"])
            for run in row.runs
            for one in run.recipe.values()
            if isinstance(one, dict) and one.get("samples") is not None
        }
        for samples, seed in sorted(used):
            text = f"{samples:,} training samples (seed {seed})"
            reading.setdefault(text, []).append(row.label)
    sentences += [
        f"Before training, {_list(names)} read {text}." for text, names in reading.items()
    ]
    return sentences


def _allocated(row: Row, what: str) -> bool:
    """Tell whether the allocation gives modules different ranks or scalings."""
    paths = {run.allocation for run in row.runs if run.allocation is not None}
    modules = [list(read_json(path)["modules"].values()) for path in paths]
    return any(len({module[what] for module in found}) > 1 for found in modules)


def _tuning(known: Known, rows: list[Row]) -> str:
    tuned = [(row, row.choice) for row in rows if row.choice is not None]
    rate = _said(known, rows, "training", "learning_rate")
    if not tuned:
        text = f"No setting was tuned{f'; the learning rate was {rate}' if rate else ''}."
        own = [
            f"{row.label} ({', '.join(keys)})"
            for row in rows
            if (keys := next((run.recipe.get("own") for run in row.runs), None))
        ]
        return text + (f" Settings of their own have {_list(own)}." if own else "")
    alike: dict[str, list[Row]] = {}
    for row, choice in tuned:
        how = f"{tables.tried_values(choice)} ({len(choice.tried)} trials each)"
        alike.setdefault(f"{how}, {tables.tuned_by(row)}", []).append(row)
    sentences = []
    for text, found in alike.items():
        names = [row.label for row in found]
        who = "Every method" if len(found) == len(rows) else _list(names)
        was = "were" if 1 < len(found) < len(rows) else "was"
        sentences.append(f"{who} {was} tuned over {text}.")
    chosen = [
        f"{row.label} "
        + ", ".join(f"{k} {tables.plain(v)}" for k, v in choice.tried[choice.winner].items())
        for row, choice in tuned
    ]
    sentences.append(f"Chosen were: {'; '.join(chosen)}.")
    edges = [
        f"{row.label}, {key}: {'highest' if side == 'upper' else 'lowest'}"
        for row, choice in tuned
        for key, side in choice.edges.items()
    ]
    if edges:
        sentences.append(f"These chosen values are the end of what was tried: {'; '.join(edges)}.")
    failed = [
        f"{row.label} {number} of {len(choice.tried)}"
        for row, choice in tuned
        if (number := sum(value is None for value in choice.values))
    ]
    sentences += [f"Trials without a result: {'; '.join(failed)}."] if failed else []
    rest = [row.label for row in rows if row.choice is None]
    if rest:
        sentences.append(f"Not tuned: {_list(rest)}.")
    return " ".join(sentences)


def _evaluation(known: Known, section: Section, labels: Mapping[str, str]) -> str:
    rows = list(section.rows)
    alike: dict[str, list[str]] = {}
    for name in section.benchmarks:
        items = sorted({n for row in rows for n in row.items(name)})
        metric = next((s.metric for row in rows for s in row.scores(name)), "")
        told = f"n = {' or '.join(f'{n:,}' for n in items)}" if items else "no result"
        told += f", {metric.replace('_', ' ')}" if metric else ""
        alike.setdefault(_decoding(known, rows, name), []).append(
            f"{labels.get(name, name)} ({told})"
        )
    sentences = []
    for how, names in alike.items():
        sentences.append(f"We evaluated on {_list(names)}{f': {how}' if how else ''}.")
    found = [
        f"{labels.get(name, name)} {one['exact']:,} of {one['n']:,}"
        for name, one in section.overlaps.items()
    ]
    if found:
        sentences.append(f"Test records that stand in the training data: {'; '.join(found)}.")
    if any(row.base for row in rows):
        sentences.append("The base model was evaluated untrained as well.")
    return " ".join(sentences)


def _decoding(known: Known, rows: list[Row], name: str) -> str:
    def said(key: str, form: Callable[[Any], str] = shown) -> str:
        return _said(known, rows, "evaluation", name, key, form=form)

    if not said("source"):
        return ""
    scorer = f"scored by {said('scorer')}" if said("scorer") else ""
    prompts = {value for row in rows for value in _values(known, row, "evaluation", name, "prompt")}
    if prompts == {""}:
        limit = said("limit")
        first = "" if limit in ("", "none") else f" on the first {limit} items"
        return f"prompts and rules of {said('source')}{first}, {scorer}"
    trained = {value for row in rows for value in _values(known, row, "data", "prompt")}
    same = prompts == trained
    template = said("prompt", _quoted)
    prompt = "the prompt of training" if same else f"the prompt {template}"
    beams = {
        value for row in rows for value in _values(known, row, "evaluation", name, "num_beams")
    }
    greedy = "greedy decoding" if beams == {1} else f"beam search with {said('num_beams')} beams"
    turns = {
        value for row in rows for value in _values(known, row, "evaluation", name, "turn_prompt")
    }
    if turns - {None}:
        greedy += ", or sampling where a question sets a temperature"
    told = [prompt, greedy, f"at most {said('max_new_tokens')} new tokens"]
    stops = said("stop", lambda value: ", ".join(map(_quoted, value)) if value else "")
    told += [f"cut at {stops}"] if stops else []
    told += [f"with {said('backend', lambda value: ENGINES.get(value, value))}"]
    limit = said("limit")
    told += [] if limit in ("", "none") else [f"the first {limit} items"]
    return ", ".join([*told, scorer] if scorer else told)


def _statistics(section: Section, found: Sequence[Record], labels: Mapping[str, str]) -> str:
    tests: dict[str, None] = {}
    for name in section.benchmarks:
        tests |= dict.fromkeys(r[f"{name}_compared_by"] for r in found if r[f"{name}_compared_by"])
    sentences = []
    if any(len(trained_seeds(row)) > 1 for row in section.rows):
        sentences.append("We report means and sample standard deviations over seeds.")
    else:
        sentences.append("Each method has one run: the spread over seeds is unknown.")
    if not tests:
        return " ".join(sentences)
    against = next((record["label"] for record in found if record["baseline"]), None)
    others = f"with {against} and with the highest mean" if against else "with the highest mean"
    sentences.append(
        f"Methods are compared {others} by {_list([TESTS[test] for test in tests])}; p-values are "
        "corrected by Holm's method for all comparisons of their kind in the table, those with the "
        "highest mean also for its selection, and held against 5 %."
    )
    model = "the same model" if "crossed" in tests else "the items alone"
    sentences.append(
        f"95 % intervals of the means are from {model}; beside them stand those of a "
        f"hierarchical bootstrap ({DRAWS:,} draws of seeds, then items)."
    )
    least = [
        f"{labels.get(name, name)} {value:.1f}"
        for name in section.benchmarks
        if (value := tables.number(found[0], name, "detectable")) is not None
    ]
    if least:
        sentences.append(
            "A true difference of two methods is found in 80 % of cases from so many points on: "
            f"{', '.join(least)}."
        )
    return " ".join(sentences)


def _software(known: Known, rows: list[Row]) -> str:
    keys = dict.fromkeys(key for row in rows for key in known[id(row)] if key[0] == "versions")
    told = [f"{key[1]} {_said(known, rows, *key)}" for key in keys]
    return f"Software of training: {', '.join(told)}." if told else ""


def _exceptions(
    section: Section, rows: list[Row], against: str | None, labels: Mapping[str, str]
) -> str:
    unequal: dict[int, list[str]] = {}
    for one in differences(section, against, labels):
        if one.kind == UNEQUAL:
            unequal.setdefault(one.place, []).append(one.text)
    sentences = [
        f"{section.rows[place].label} is not comparable with the others: {'; '.join(texts)}."
        for place, texts in unequal.items()
    ]
    failed = [f"{row.label} {row.failed()} of {len(row.runs)}" for row in rows if row.failed()]
    if failed:
        sentences.append(
            f"Runs without some result, which are left out there: {'; '.join(failed)}."
        )
    return " ".join(sentences)
