"""The files of a new method: a variant of another one, or a module of its own to be edited."""

from __future__ import annotations

import dataclasses
import keyword
import re
from pathlib import Path

import yaml

from tlora.artefact import write_text
from tlora.config import Library, module_of, typed
from tlora.errors import UserError

# Rows of a table that are no method.
RESERVED = ("base",)

VARIANT = """\
# A variant of {parent}: what stands here replaces its values. There they are
{options}
label: {name}
extends: {parent}
options: {{}}
"""

CONFIGURATION = """\
# `label` is what tables print; add `paper:`, and `training:` for hyperparameters of its own.
label: {name}
implementation: {name}
options: {{gain: 1.0}}
"""

MODULE = '''\
"""{name}: LoRA whose A starts `gain` times as large. A starting point: change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tlora.methods import Context


@dataclass(frozen=True)
class Options:
    """`gain`: how many times as large A starts as LoRA's."""

    gain: float = 1.0

    def __post_init__(self) -> None:
        # The part before the colon is the key that the error names, with file and line.
        if self.gain <= 0:
            raise ValueError(f"gain: {{self.gain}}: expected a number above 0")


def adapt(model: PreTrainedModel, options: Options, context: Context) -> PeftModel:
    """Put the adapter on the model; afterwards the logits must equal the base model's.

    Heavy imports stand inside functions. `tlora/methods/__init__.py` lists the other hooks: data
    that `adapt` reads, another optimizer or loss, models it does not fit, another export.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=context.rank,
        lora_alpha=context.lora_alpha,
        target_modules=context.target_modules,
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.mul_(options.gain)
    return adapted
'''


def new_method(name: str, extends: str | None = None, folder: Path = Path()) -> list[Path]:
    """Write config/methods/{name}.yaml and, unless it extends a method, tlora/methods/{name}.py.

    Parameters
    ----------
    name
        The method's name: a Python module's, in lower case.
    extends
        A method whose options the new one changes.
    folder
        The project's top level.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UserError
        A name that is taken or no module's, a method that cannot be extended, or no project here.
    """
    library = Library(folder / "config")
    configuration = folder / "config" / "methods" / f"{name}.yaml"
    module = folder / "tlora" / "methods" / f"{name}.py"
    plain = re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name)
    if not plain or yaml.safe_load(name) != name:
        raise UserError(
            f"new: {name!r}: expected a name of lower-case letters, digits and _ that starts with "
            "a letter and is no word of Python or YAML"
        )
    for parent in (configuration.parent, module.parent):
        if not parent.is_dir():
            raise UserError(f"new: {parent}: no such folder: run it in the project's top level")
    for path in (configuration, module):
        if path.exists():
            raise UserError(f"new: {name!r}: {path} is there already: expected another name")
    if name in RESERVED:
        raise UserError(f"new: {name!r}: names a row of its own in every table")
    if extends is not None:
        text = VARIANT.format(name=name, parent=extends, options=_options(library, extends))
        write_text(configuration, text)
        return [configuration]
    write_text(module, MODULE.format(name=name))
    write_text(configuration, CONFIGURATION.format(name=name))
    return [configuration, module]


def _options(library: Library, name: str) -> str:
    """Return a method's effective options as YAML in comments."""
    config, document = library.method(name, "new: --extends")
    if library.document("methods", name, "new").values.get("extends"):
        raise UserError(f"new: --extends: {name!r}: extends another one itself: expected that one")
    kind = module_of(document, "implementation", "methods", config.implementation).Options
    values = dataclasses.asdict(typed(document, ("options",), kind, config.options))
    lines = yaml.safe_dump(values, sort_keys=False).splitlines() if values else ["without options"]
    return "\n".join(f"#   {line}" for line in lines)
