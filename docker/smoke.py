"""Does this image train? `docker run --rm [--gpus all] IMAGE smoke`

Trains a tiny random model for three steps under FSDP2 and under ZeRO-3, on every GPU (without one, on two
processes), through the same command that trains real ones, and tries FlashAttention where there is a GPU.
Nothing is downloaded. Exit status 0 where all of it worked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "launch" / "train.py"
ROWS = [{"prompt": f"count to {i}:", "completion": " ".join(map(str, range(i)))} for i in range(2, 30)]


def write_model(where: Path) -> None:
    """A random Llama of two layers, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.add_special_tokens(["<end>"])
    template = "{% for m in messages %}{{ m['content'] }}{{ '<end>' }}{% endfor %}"
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", chat_template=template
    )
    words.save_pretrained(where)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(where)


def main() -> int:
    import torch

    gpus = torch.cuda.device_count()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {gpus} GPUs", flush=True)
    with tempfile.TemporaryDirectory() as place:
        model, data = Path(place, "model"), Path(place, "rows.jsonl")
        write_model(model)
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        for strategy in ("fsdp", "zero3"):
            run_dir = Path(place, strategy)
            told = [f"model.path={model}", f"data.train=[{{path: {data}}}]", f"data.cache_dir={place}/cache"]
            told += [f"strategy={strategy}", f"launch.nproc={gpus or 2}", "steps=3", f"run_dir={run_dir}"]
            told += [
                f"batch.sequences={2 * (gpus or 2)}",
                "data.max_length=256",
                "retain.builtin=false",
                "batch.tokens_per_micro=256",
            ]
            offline = os.environ | {"HF_HUB_OFFLINE": "1"}
            status = subprocess.run([sys.executable, str(TRAIN), *told], env=offline).returncode
            result = json.loads((run_dir / "result.json").read_text()) if status == 0 else {}
            if result.get("status") != "done" or not (run_dir / "model" / "config.json").is_file():
                print(f"error: {strategy} did not train (exit status {status})", file=sys.stderr)
                return 1
            print(f"{strategy}: {result['steps']} steps on {gpus or 2} ranks, model exported", flush=True)
    if gpus:
        from flash_attn import flash_attn_func

        q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
        want = torch.nn.functional.scaled_dot_product_attention(
            *(3 * [q.transpose(1, 2).float()]), is_causal=True
        )
        error = (flash_attn_func(q, q, q, causal=True).transpose(1, 2).float() - want).abs().max().item()
        print(f"flash-attn: off by {error:.1e} from plain attention")
        if error > 2e-2:  # bf16 carries 8 bits
            return 1
    print("smoke: all right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
