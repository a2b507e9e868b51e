"""What is a secret and where it is hidden: by its key, in a URL, by its looks, by its value anywhere."""

import pytest

from framework.config import secrets

CANARY = "canary-0123456789"


@pytest.mark.parametrize(
    "name",
    "api_key apiKey API_KEY WANDB_API_KEY HF_TOKEN hubToken AWS_SECRET_ACCESS_KEY PGPASSWORD DB_PASSWD auth "
    "X-Amz-Signature sig access_token api_keys GITHUB_PAT".split(),
)
def test_names_of_secrets(name):
    assert secrets.named(name)


@pytest.mark.parametrize(
    "name",
    "tokens_per_micro head_chunk_tokens max_new_tokens tokenizer TOKENIZERS_PARALLELISM keys path author "
    "monkey design gradient_checkpointing".split(),
)
def test_names_of_settings(name):
    assert not secrets.named(name)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"+reward.api_key={CANARY}", "+reward.api_key=***"),
        (f"+reward.api_key='{CANARY} x, y'", "+reward.api_key=***"),
        (f"+x.password={CANARY},other", "+x.password=***"),  # a sweep over two
        (f"a=[{{_target_: f, api_key: {CANARY}}}]", "a=[{_target_: f, api_key: ***}]"),
        (f"a=[{{api_key: 'a,}}{CANARY}', words: 3}}]", "a=[{api_key: ***, words: 3}]"),
        (f"a={{auth: {{user: me, token: {CANARY}}}, b: 1}}", "a={auth: ***, b: 1}"),
        (f"path='https://me:{CANARY}@host/x'", "path='https://***@host/x'"),
        (f"path=https://host/x?a=1&token={CANARY}&b=2", "path=https://host/x?a=1&token=***&b=2"),
        (f"path=https://h/x?X-Amz-Signature={CANARY}", "path=https://h/x?X-Amz-Signature=***"),
        ("data.train=[{path: token.jsonl}]", "data.train=[{path: token.jsonl}]"),
        ("loss.beta=0.1", "loss.beta=0.1"),
        ("note=hf_abcdefghijklmnopqrstuv", "note=***"),
        ("note=the key: is under the mat", "note=the key: ***"),
    ],
)
def test_what_was_typed(given, shown):
    assert secrets.typed(given) == shown


def test_values_of_the_environment_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SERVICE_KEY", f"first-line-{CANARY}\nsecond-line-{CANARY}")
    monkeypatch.setenv("SHORT_KEY", "words")  # too short to be searched for
    monkeypatch.setenv("PWD", "/usr/lib")  # a place
    assert secrets.hidden(f"said second-line-{CANARY} in words /usr/lib") == "said *** in words /usr/lib"


def test_a_mask_knows_the_secrets_of_a_tree_and_of_a_line():
    """A password of a URL is hidden by itself, too: a library's error may quote it."""
    tree = {"url": f"s3://me:{CANARY}-1@host", "judge": {"token": f"{CANARY}-2", "size": 3}, "pin": 4}
    hide = secrets.mask(tree, [f"+reward.functions=[{{api_key: '{CANARY}-3'}}]"])
    said = f"{CANARY}-1 {CANARY}-2 {CANARY}-3 size 3"
    assert hide(said) == "*** *** *** size 3"


def test_a_tree_for_files():
    tree = {"auth": [CANARY, 12345678], "retries": {"key": 3}, "path": f"https://h/?sig={CANARY}", "n": 1.5}
    assert secrets.concealed(tree) == {
        "auth": ["***", "***"],
        "retries": {"key": 3},  # a number that short is a setting
        "path": "https://h/?sig=***",
        "n": 1.5,
    }
