"""Files of records in every format that the sources read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the path's suffix; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
