"""A world of twelve letters in which forgetting takes seconds: three skills and some facts, then a cipher.

Rows are `Rabcd=dcba>`: a task's letter and a word, then the answer. C copies, R reverses, S sorts, F knows
what belongs to a word (facts, half of which can be replayed), and K shifts every letter by three, which is
learnt after the others. KK shifts by five, for what comes after that.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.config.compose import compose
from framework.config.work import work

LETTERS = "abcdefghijkl"
SKILLS = "CRS"
SETTINGS = (
    "launch.device=cpu launch.threads=1 precision=fp32 data.max_length=32 data.packing=false "
    "batch.sequences=64 batch.tokens_per_micro=2048 tracker.console=none tracker.report=false "
    "evaluate.samples=0 retain=none optim.betas=[0.9,0.98]"
).split()


def write_model(directory: Path, *, begins: bool = False) -> Path:
    """An untrained Llama of 150k parameters whose tokens are characters.

    With `begins` texts start with a token of their own, so that the first letter is learnt, too.
    """
    import tiny
    from tokenizers import processors

    words = tiny.speller(["<pad>", "<eos>", "<unk>", *LETTERS, *"CRSFK=>"], model_max_length=64)
    if begins:
        words.add_special_tokens({"bos_token": "<bos>"})
        start = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", words.bos_token_id)]
        )
        words.backend_tokenizer.post_processor = start
    lm = tiny.llama(
        words,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
    )
    return tiny.save(lm, words, directory)


def train(place: Path, name: str, *overrides: str) -> dict[str, Any]:
    """result.json of a run in this process."""
    own = [f"run_dir={place}/{name}", f"data.cache_dir={place}/cache"]
    assert work(compose([*own, *SETTINGS, *overrides])) == 0, f"{name} did not finish; see {place / name}"
    return json.loads((place / name / "result.json").read_text())


def word(seed: str, letters: int = 4) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(LETTERS) for _ in range(letters))


def row(task: str, given: str) -> dict[str, str]:
    answer = {
        "C": given,
        "R": given[::-1],
        "S": "".join(sorted(given)),
        "K": shifted(given, 3),
        "KK": shifted(given, 5),
    }[task]
    return {"prompt": f"{task}{given}=", "completion": f"{answer}>"}


def shifted(given: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + by) % len(LETTERS)] for c in given)


def rows(tasks: Sequence[str], count: int, seed: str) -> list[dict[str, str]]:
    return [row(task, word(f"{seed} {task} {i}")) for i in range(count) for task in tasks]


def write_data(directory: Path) -> dict[str, Path]:
    """learn: skills and facts; replay: some of them; skills, facts: to probe, and many of the skills; cipher;
    held: more of it; second, second_held: of the cipher after that."""
    facts = [
        {"prompt": f"F{word(f'fact {i}', 3)}=", "completion": f"{word(f'means {i}', 3)}>"} for i in range(40)
    ]
    probed = rows(SKILLS, 40, "probed")
    asked = {each["prompt"] for each in probed}
    trained = [each for each in rows(SKILLS, 1500, "trained") if each["prompt"] not in asked]
    known = {each["prompt"] for each in trained}
    many = [each for each in rows(SKILLS, 900, "many") if each["prompt"] not in known]
    sets = {
        "learn": trained + facts * 20,
        "replay": trained[:2100] + facts[:20] * 10,
        "skills": probed,
        "many": many,
        "facts": facts[20:],
        "cipher": rows("K", 1500, "cipher"),
        "held": rows("K", 100, "held"),
        "second": rows(["KK"], 1500, "second"),
        "second_held": rows(["KK"], 100, "held"),
    }
    for name, each in sets.items():
        written = directory / f"{name}.tmp"
        written.write_text("".join(json.dumps(one) + "\n" for one in each))
        written.replace(directory / f"{name}.jsonl")  # another arm may read the same rows just now
    return {name: directory / f"{name}.jsonl" for name in sets}


def accuracy(model: Path, path: Path) -> float:
    """Share of rows whose whole answer is the likeliest one, letter by letter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).float()
    asked = [json.loads(line) for line in path.read_text().splitlines()]
    ids = torch.tensor([words(each["prompt"])["input_ids"] for each in asked])
    length = ids.shape[1]
    with torch.no_grad():
        for _ in asked[0]["completion"]:
            ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], 1)
    said = [words.decode(each[length:].tolist()) for each in ids]
    return sum(s == each["completion"] for s, each in zip(said, asked, strict=True)) / len(asked)
