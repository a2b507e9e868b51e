"""The real vLLM beside a model on the same device: weights arrive, log-probabilities agree."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from framework.rollout.base import Prompt, Sampling
from framework.rollout.vllm import Colocated, VllmRollout
from framework.strategy.world import connect


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False])
def test_a_colocated_engine_takes_two_updates(tied, tmp_path, tiny_model_dir):
    """Heads of 64, which every kernel knows. bf16 on both sides: tenths of a nat at worst, no whole ones."""
    pytest.importorskip("vllm")
    words = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    world = connect("cuda", timeout_s=60)
    engine = Colocated(str(tmp_path), world, max_length=128, memory_share=0.2, dtype="bfloat16")
    rollout = VllmRollout(engine, words, world, ends=[words.eos_token_id])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda").eval()
    prompt = Prompt(tuple(words("the cat sat on the mat").input_ids), 0)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1)
        rollout.update(((f"lm.{n}", p.detach()) for n, p in model.named_parameters()), version=version)
        for answer in rollout.generate([prompt], Sampling(16, samples=4))[0]:
            ids = torch.tensor([[*prompt.ids, *answer.ids]], device="cuda")
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt.ids) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt.ids) :, None])[:, 0].cpu()
            torch.testing.assert_close(torch.tensor(answer.logps), expected, atol=0.3, rtol=0)
    rollout.close()
