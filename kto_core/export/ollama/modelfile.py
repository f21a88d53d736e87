"""An Ollama Modelfile for a GGUF: FROM, an explicit TEMPLATE, PARAMETER lines, LICENSE.

Ollama's templates are Go's, and it only guesses a Jinja template by its likeness to those it knows. So the template is
written here, from texts read off the model's own chat template (`probing`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from .parameters import Value
from .probing import Render, derive

GUESSED = "There is no TEMPLATE here, so Ollama guesses one. Compare its answers with those of Check."
DATED = "The chat template inserts the current date; here it is fixed to the date of the export."


@dataclass(frozen=True)
class Modelfile:
    """``template``: in Go, or "" if there is none. ``remarks``: what Ollama will do otherwise than the model's own
    template; they are comments of the Modelfile as well."""

    template: str
    stops: list[str]
    parameters: dict[str, Value] = field(default_factory=dict)
    license: str = ""
    remarks: list[str] = field(default_factory=list)

    def text(self, gguf_name: str, own_name: str) -> str:
        """A Modelfile called ``own_name`` beside the file ``gguf_name``."""
        lines = [f"# ollama create NAME -f {own_name}", *(f"# {r}" for r in self.remarks), f"FROM ./{gguf_name}"]
        if self.template:
            lines.append(f'TEMPLATE """{self.template}"""')
        lines += [f'PARAMETER stop "{_escaped(s)}"' for s in self.stops]
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters.items()]
        if self.license:
            lines.append(f'LICENSE """{self.license}"""')
        return "\n".join(lines) + "\n"

    def hub_files(self) -> dict[str, str]:
        """Files that Ollama reads from a repository of GGUF files: name -> text (huggingface.co/docs/hub/ollama)."""
        params = json.dumps({"stop": self.stops, **self.parameters}, indent=1, ensure_ascii=False)
        return ({"template": self.template} if self.template else {}) | {"params": params + "\n"}


def make(
    render: Render,
    *,
    bos: str,
    eos: str,
    dated: bool = False,
    parameters: dict[str, Value] | None = None,
    license: str = "",
) -> Modelfile:
    """A Modelfile from a model's chat template.

    Args:
        render: (messages, generation=True, tools=None) -> text; raises ExportError where the template refuses.
        bos: text that Ollama puts before everything by itself, or "". eos: text of the end token.
        dated: the chat template writes the day's date.
        license: name or text.
    """
    pieces, remarks = derive(render, bos)
    stops = [eos]
    if pieces is None:
        remarks.append(GUESSED)
    else:
        if dated:
            remarks.append(DATED)
        # a model that writes the next question itself has to be stopped
        stops += [pieces.after["assistant"].strip(), pieces.before["user"][""].strip().partition("\n")[0]]
    stops = [s for s in dict.fromkeys(stops) if s and (s == eos or not eos or eos not in s)]
    quoted = license.replace('"""', "'''").strip()
    return Modelfile(pieces.go() if pieces else "", stops, parameters or {}, quoted, remarks)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
