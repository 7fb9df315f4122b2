"""A hundred guards beside a generator: each token that it writes is scored from what the base has computed anyway."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import sidetuning as st


def small_gpt(folder: str) -> None:
    """Stands in for a model of yours: a GPT-2 with random weights."""
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 0,
    }
    with st.seeded(0):
        net: Any = GPT2LMHeadModel(GPT2Config(**settings, eos_token_id=None, pad_token_id=0))
        # Trained models tell tokens apart better than positions.
        net.get_input_embeddings().weight.data *= 10
        net.save_pretrained(folder)


def main(guards: int = 100, steps: int = 60) -> float:
    """Learn guards that each watch for some tokens, and return how many of their judgements are right."""
    with tempfile.TemporaryDirectory() as folder:
        small_gpt(folder)
        base = st.load_base(f"hf:{folder}", taps=["h.0", "h.1", "h.2"])
    model = st.SideTuner(base)
    model.add_task("style", side="ladder", head="lm", seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (64, 32), generator=generator)
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    features = base(x)
    names = [f"guard-{k}" for k in range(guards)]
    watched = torch.randint(2, (guards, 50), generator=generator)
    for name, mine in zip(names, watched, strict=True):
        model.add_task(name, side=None, merge="base-only", head="tokens", head_options={"outputs": 2}, seed=0)
        batch = (x, features, mine[ids])
        st.fit(model, name, [batch], steps=steps, lr=0.1, progress=False)

    # Generation keeps the base's hidden states: of the prompt, then of each token.
    config = GenerationConfig(max_new_tokens=12, return_dict_in_generate=True, output_hidden_states=True)
    prompt = {"input_ids": ids[:4, :8], "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    written = model.generate(prompt, "style", generation_config=config)
    # (b, tokens, d): the last token was written, and not read.
    code = torch.cat([step[-1] for step in written.hidden_states], 1)
    tokens = written.sequences[:, : code.shape[1]]

    # One product for all guards: (b, tokens, guards, 2).
    heads: list[Any] = [model[name].head for name in names]
    weight, bias = torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
    scores = torch.nn.functional.linear(code, weight, bias).unflatten(-1, (guards, 2))
    one = model({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, names[0])
    assert torch.allclose(scores[:, :, 0], one, atol=1e-4)
    return float((scores.argmax(-1) == watched[:, tokens].permute(1, 2, 0)).float().mean())


if __name__ == "__main__":
    print(f"{main():.1%} of the guards' judgements are right")
