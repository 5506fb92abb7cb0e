"""Judge the reference solutions of HumanEval+ and MBPP+ as if a model had written them.

    python tests/benchmarks/reference_solutions.py DATA_ROOT [--workers 2] [--sanitize]

DATA_ROOT holds code/HumanEvalPlus-v0.1.10.jsonl.gz and code/MbppPlus-v0.2.0.jsonl.gz. Every one of
them should pass the base and the plus tests; an empty program and a wrong one should not. With
--sanitize EvalPlus' sanitizer looks for the program first, as it does with a model's completions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tlora.benchmarks import Context, evalplus
from tlora.tasks import evalplus as source


def main() -> None:
    """Print one line for each kind of program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    for dataset in evalplus.DATASETS:
        records = source.load(source.Data(dataset), "test", options.data_root)
        programs = {
            "reference": [record["response"] for record in records],
            "wrong": [
                f"def {record['reference']['entry_point']}(*arguments):\n    return object()"
                for record in records
            ],
            "empty": [""] * len(records),
        }
        for name, texts in programs.items():
            start = time.monotonic()
            result = evalplus.score(
                [
                    {**record, "completion": text}
                    for record, text in zip(records, texts, strict=True)
                ],
                evalplus.Options(sanitize=options.sanitize),
                Context(place={"workers": options.workers}),
            )
            items = result["items"]
            failed = [item["id"] for item in items if not item["plus_correct"]]
            print(
                f"{dataset}, {name}: {sum(item['correct'] for item in items)} of {len(items)} pass "
                f"base, {len(items) - len(failed)} pass plus; "
                f"{time.monotonic() - start:.0f} s with {options.workers} workers"
                + (f"; not {', '.join(failed)}" if len(failed) < 10 and failed else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
