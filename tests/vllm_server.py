"""A vLLM server on the CPU, of the environment that `make vllm-test` installs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    # What vLLM asks tcmalloc for: memory that is freed is kept, not handed back page by page.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment variables of everything that runs vLLM here."""


@contextlib.contextmanager
def vllm_server(
    python: Path, model: Path, log: Path, environment: Mapping[str, str], *options: object
) -> Iterator[str]:
    """Run a server that takes adapters while it runs; the value is its URL.

    Raises
    ------
    RuntimeError
        Where it does not answer within 400 s; the end of its log is the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve`, whose program asks for a package of the name vllm; this one's is vllm-cpu.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port]
    command += ["--max-model-len", 512, "--enable-lora", *options]
    # The engine's process runs the model itself, as in a job; one more would load vLLM again.
    environment = {
        **environment,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 400
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(encoding="utf-8")[-3000:])
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
