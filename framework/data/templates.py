"""Chat templates by name, for tokenizers that have none of their own.

Text only: nothing is rendered here. Both built-ins end every assistant turn with a token that the model
can stop at, and refuse tool calls, which they cannot express.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framework.errors import ModelError

_NO_TOOLS = (
    "{% if tools %}{{ raise_exception('this template knows no tools') }}{% endif %}"
    "{% for message in messages %}{% if message.tool_calls or message.role == 'tool' %}"
    "{{ raise_exception('this template knows no tool calls') }}{% endif %}{% endfor %}"
)

BUILT_IN: dict[str, str] = {
    # OpenAI's chat markup, for vocabularies with <|im_start|> and <|im_end|>.
    "chatml": _NO_TOOLS
    + "{% for message in messages %}"
    + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    + "{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # Headings in plain words, for any tokenizer with an end-of-sequence token.
    "plain": _NO_TOOLS
    + "{{ bos_token or '' }}{% for message in messages %}"
    + "{{ '### ' + message.role | capitalize + ':\\n' + message.content }}"
    + "{{ eos_token if message.role == 'assistant' }}{{ '\\n\\n' }}"
    + "{% endfor %}"
    + "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}",
}

CHOICES = f"one of {', '.join(BUILT_IN)}, a .jinja file or a template"


def resolve(tokenizer: Any, chosen: str | None) -> str | None:
    """The text of the chat template to use; None when the tokenizer has none and none was chosen.

    `chosen` is `model.chat_template`: null for the model's own, the name of a built-in, the path of a
    .jinja file, or the template itself. Raises ModelError for anything else.
    """
    if chosen is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            if "default" not in own:
                raise ModelError(
                    f"the tokenizer has chat templates {', '.join(own)} and none called default; "
                    f"set model.chat_template to {CHOICES}"
                )
            own = own["default"]
        return own
    if chosen in BUILT_IN:
        return BUILT_IN[chosen]
    if "{{" in chosen or "{%" in chosen:
        return chosen
    path = Path(chosen).expanduser()
    if not path.is_file():
        raise ModelError(
            f"model.chat_template={chosen}: no such file and no such template; expected {CHOICES}"
        )
    return path.read_text(encoding="utf-8")
