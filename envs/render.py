"""Write the conda environments from the locks: `python envs/render.py` (`make envs`).

Snakemake copies an environment file away before conda reads it, so `-r core.lock` cannot stand in
it, and its content is what decides whether an environment is rebuilt. Hence every pin is listed.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = "3.11"
PIP = "25.3"
LOCKS = {
    "core": ("core",),
    "train": ("core", "train", "lm_eval"),
    "code": ("core", "code"),
    "vllm": ("vllm",),
}


def pins(lock: str) -> list[str]:
    """Return the `name==version` lines of envs/{lock}.lock."""
    lines = (HERE / f"{lock}.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def render(env: str) -> str:
    """Return the text of envs/{env}.yaml."""
    names = " and ".join(f"{lock}.lock" for lock in LOCKS[env])
    requirements = sorted((pin for lock in LOCKS[env] for pin in pins(lock)), key=str.lower)
    return "\n".join(
        [
            f"# Written by `make envs` from {names}. The package itself is installed by",
            f"# {env}.post-deploy.sh.",
            "channels:",
            "  - conda-forge",
            "  - nodefaults",
            "dependencies:",
            f"  - python={PYTHON}",
            f"  - pip={PIP}",
            "  - pip:",
            *(f"      - {requirement}" for requirement in requirements),
            "",
        ]
    )


if __name__ == "__main__":
    for name in LOCKS:
        (HERE / f"{name}.yaml").write_text(render(name), encoding="utf-8")
