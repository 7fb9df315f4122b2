"""Decoders: their codes whatever the padding, tasks that write with the base's own output embedding, and generation."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sidetuning as st
from sidetuning.artifacts import read_task
from sidetuning.cache import cache_tokens
from sidetuning.generating import Merged
from sidetuning.hub import asking
from text_parts import WORDS, Lines

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
GPT2: dict[str, Any] = {"vocab_size": 50, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
OPT: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32}
SOFT: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 8}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", GPT2, "h"),
    "llama": ("LlamaConfig", {**SHAPE, "num_key_value_heads": 2}, "layers"),
    "qwen2": ("Qwen2Config", {**SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": True}, "layers"),
    "gemma2": ("Gemma2Config", {**SHAPE, **SOFT}, "layers"),
    "opt": ("OPTConfig", {**SHAPE, **OPT}, "decoder.layers"),
    "gpt_neox": ("GPTNeoXConfig", SHAPE, "layers"),
    "mistral": ("MistralConfig", {**SHAPE, "num_key_value_heads": 2}, "layers"),
    "phi": ("PhiConfig", SHAPE, "layers"),
    "cohere": ("CohereConfig", {**SHAPE, "num_key_value_heads": 2, "logit_scale": 0.3}, "layers"),
    "mamba": ("MambaConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3}, "layers"),
}
# Kinds that have nothing that others do not have.
ALIKE = ("qwen2", "mistral", "phi")
SIDES: dict[str, dict[str, Any]] = {
    "each": {"side": "ladder"},
    "back": {"side": "ladder", "side_options": {"heads": 2}},
    "own": {"side": "transformer", "side_options": {"layers": 1, "width": 16}},
}
IDS = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def text(ids: Tensor, before: int = 0, after: int = 0) -> dict[str, Tensor]:
    """Ids (b, t) with padding before and after them."""
    return {
        "input_ids": F.pad(ids, (before, after)),
        "attention_mask": F.pad(torch.ones_like(ids), (before, after)),
    }


def network(kind: str) -> Any:
    """A model with its output embedding, of random weights that are large enough to tell tokens apart."""
    name, shape, _ = KINDS[kind]
    config = getattr(transformers, name)(**{**shape, **SPECIAL})
    with st.seeded(0):
        net = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in net.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return net


def saved(folder: Path, kind: str = "gpt2") -> st.Base:
    network(kind).save_pretrained(folder)
    return st.load_base(f"hf:{folder}", taps=[f"{KINDS[kind][2]}.{k}" for k in range(3)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a tokenizer of words and a template for chats."""
    folder = tmp_path_factory.mktemp("gpt2")
    network("gpt2").save_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS[:20], *map(chr, range(97, 125))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}it was"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def base(folder: Path) -> st.Base:
    return st.load_base(f"hf:{folder}", taps=["h.0", "h.1", "h.2"])


def learned(base: st.Base, tasks: Sequence[str] = tuple(SIDES)) -> st.SideTuner:
    """A model of tasks that write in three ways, as if they had been trained."""
    model = st.SideTuner(base)
    for seed, task in enumerate(tasks):
        branch = model.add_task(task, **SIDES[task], head="lm", seed=seed)
        with st.seeded(seed), torch.no_grad():
            for parameter in branch.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def greedy(model: st.SideTuner, ids: Tensor, task: str, new: int) -> Tensor:
    """Go on with ids by whole passes."""
    for _ in range(new):
        ids = torch.cat([ids, model(text(ids), task)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in ALIKE else ()) for kind in KINDS]
)
def test_every_kind_writes_as_it_did_and_as_its_tasks_do(kind: str, tmp_path: Path) -> None:
    base, net = saved(tmp_path, kind), network(kind)
    assert base.causal and base.lm is not None
    fresh = st.SideTuner(base)
    for side in ("ladder", "transformer", "copy"):
        fresh.add_task(side, side=side, head="lm")
        assert torch.equal(fresh(text(IDS), side), net(**text(IDS)).logits)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fresh.generate(IDS, **settings), net.generate(IDS, **settings))
    model = learned(base)
    for task in SIDES:
        told = greedy(model, IDS, task, 4)
        assert torch.equal(model.generate(IDS, task, **settings), told)
        padded = model.generate(text(IDS, before=3), task, **settings)[:, 3:]
        assert torch.equal(padded, told), task
    assert not torch.equal(told, net.generate(IDS, **settings))
    mixed = model.generate(IDS, ["own", None, "back"], **settings)
    rows = [model.generate(IDS[i : i + 1], task, **settings) for i, task in enumerate(["own", None, "back"])]
    assert torch.equal(mixed, torch.cat(rows))


@pytest.mark.parametrize("task", SIDES)
def test_caches_beams_and_samples_are_those_of_whole_passes(task: str, base: st.Base) -> None:
    model = learned(base)
    plain = transformers.GenerationConfig(max_new_tokens=5, use_cache=False, pad_token_id=0)
    beams = model.generate(IDS, task, num_beams=3, generation_config=plain)
    assert torch.equal(model.generate(IDS, task, num_beams=3, max_new_tokens=5, do_sample=False), beams)
    plain.num_return_sequences = 2
    several = model.generate(IDS, [task, "each", "own"], num_beams=2, generation_config=plain)
    plain.num_beams, plain.use_cache = 2, True
    assert torch.equal(model.generate(IDS, [task, "each", "own"], generation_config=plain), several)
    assert len(several.unique(dim=0)) == 6
    plain.num_return_sequences, plain.num_beams, plain.use_cache = 1, 1, False
    drawn = []
    for config in (None, plain):
        with st.seeded(3):
            how: dict[str, Any] = {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7}
            drawn.append(model.generate(IDS, task, max_new_tokens=5, generation_config=config, **how))
    assert torch.equal(*drawn)


def test_padding_after_a_text_is_moved_before_it(base: st.Base) -> None:
    model = learned(base)
    for task in (*SIDES, None):
        new = model.generate(IDS, task, max_new_tokens=4)[:, 7:]
        ragged = text(IDS, after=2)
        ragged["input_ids"][1] = F.pad(IDS[1], (2, 0))
        ragged["attention_mask"][1] = F.pad(torch.ones(7, dtype=torch.long), (2, 0))
        expected = torch.cat([F.pad(IDS, (2, 0)), new], 1)
        assert torch.equal(model.generate(ragged, task, max_new_tokens=4), expected)
    with pytest.raises(st.DataError, match="a text without a token"):
        model.generate({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}, "each")


def test_texts_give_texts_and_chats_go_through_the_template(base: st.Base) -> None:
    model = learned(base)
    one = model.generate("what is the number", "each", max_new_tokens=5)
    assert isinstance(one, str) and len(one.split()) == 5
    both = model.generate(["what is the number", "red"], "each", max_new_tokens=5)
    assert both[0] == one and both[1] == model.generate("red", "each", max_new_tokens=5)
    chat = [{"role": "user", "content": "what is"}]
    assert model.generate(chat, "own", max_new_tokens=5) == model.generate("what is it was", "own", max_new_tokens=5)
    assert len(model.generate([chat, chat], None, max_new_tokens=2)) == 2
    of_tasks = model.generate("red", ["each", "back", None], max_new_tokens=5)
    assert of_tasks == [model.generate("red", task, max_new_tokens=5) for task in ("each", "back", None)]
    config = transformers.GenerationConfig(return_dict_in_generate=True, output_logits=True, max_new_tokens=2)
    found = model.generate(IDS, "each", generation_config=config)
    assert torch.allclose(found.logits[0], model(text(IDS), "each")[:, -1], atol=1e-5)


def test_tasks_that_are_alike_and_read_other_taps_are_not_run_as_one(base: st.Base) -> None:
    model = st.SideTuner(base)
    for seed, taps in enumerate((["h.0"], ["h.2"], ["h.2"])):
        branch = model.add_task(f"t{seed}", side="ladder", head="lm", taps=taps, seed=seed)
        with st.seeded(seed), torch.no_grad():
            branch.side.fit.project.weight.normal_()  # type: ignore[union-attr, operator]
    names = [f"t{seed}" for seed in range(3)]
    groups = Merged(model.base, {name: model[name] for name in names}, names).groups
    assert [group for group, _ in groups] == [["t0"], names[1:]]
    mixed = model.generate(IDS, names, max_new_tokens=5)
    alone = [model.generate(IDS[k : k + 1], name, max_new_tokens=5) for k, name in enumerate(names)]
    assert torch.equal(mixed, torch.cat(alone))
    assert torch.equal(model.generate(IDS[:1], names, max_new_tokens=5)[1:2], greedy(model, IDS[:1], "t1", 5))


def test_threads_get_their_own_texts(base: st.Base) -> None:
    model = learned(base)
    asked = [(IDS[i % 3 : i % 3 + 1], task) for i in range(6) for task in (*SIDES, None)]
    told = [model.generate(ids, task, max_new_tokens=3) for ids, task in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: model.generate(pair[0], pair[1], max_new_tokens=3), asked))
    assert all(map(torch.equal, found, told))


def test_tasks_that_read_each_token_alone_are_added_without_a_base_pass(
    base: st.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, encode = [], st.Base.encode

    def counted(self: st.Base, inputs: Any) -> Any:
        passes.append(inputs)
        return encode(self, inputs)

    model = st.SideTuner(base)
    monkeypatch.setattr(st.Base, "encode", counted)
    model.add_task("a", side="ladder", head="lm")
    assert not passes
    # A side that looks back is looked at.
    model.add_task("b", side="ladder", head="lm", side_options={"heads": 4})
    assert passes


def test_what_cannot_be_written_is_refused(base: st.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learned(base, ["each"])
    model.add_task("guard", side=None, merge="base-only", head=2)
    with pytest.raises(st.TaskError, match="'guard' writes no texts"):
        model.generate("red", "guard")
    with pytest.raises(st.TaskError, match=r"model\.generate\('…', task='each'\)"):
        model.predict("red")
    assert list(model.predict("red", ["guard"])) == ["guard"]
    with pytest.raises(st.TaskError, match="2 tasks for 3 texts"):
        model.generate(IDS, ["each", "each"])
    with pytest.raises(st.UnknownNameError, match="did you mean 'each'"):
        model.generate(IDS, "eac")
    wrong: list[Any] = [3, [], ["a", 3], IDS.float(), IDS[0], {"ids": IDS}, IDS[:, :0], ["", "red"]]
    for source in wrong:
        with pytest.raises(st.DataError, match=r"text|ids"):
            model.generate(source, "each")
    with pytest.raises(st.TaskError, match="give init='zero'"):
        model.add_task("wrong", side="copy", head="lm", init="silent")
    with pytest.raises(st.DataError, match="not 'labels'"):
        model.generate({"input_ids": IDS, "labels": IDS}, "each")
    for sees in ({"side": "ladder", "side_options": {"causal": False, "heads": 2}}, {"side": Backwards()}):
        with pytest.raises(st.TaskError, match="sees later tokens"):
            model.add_task("wrong", head="lm", **sees)
    with pytest.raises(st.ShapeError, match="or a shorter text"):
        model.generate(IDS.repeat(1, 10), "each", max_new_tokens=3)
    assert base.transform is not None
    monkeypatch.setattr(base.transform.tokenizer(), "chat_template", None)  # type: ignore[attr-defined]
    with pytest.raises(st.ShapeError, match="no text of this chat"):
        model.generate([{"role": "user", "content": "red"}], "each")
    encoder = st.SideTuner(st.Base(nn.Linear(4, 4), example=torch.zeros(1, 4)))
    with pytest.raises(st.TaskError, match="has none: load one"):
        encoder.add_task("style", side="mlp", head="lm")
    with pytest.raises(st.TaskError, match="writes no texts: it has no output embedding"):
        encoder.generate("red")
    with pytest.raises(st.TaskError, match="use fit"):
        st.solve(model, "each", [(text(IDS), IDS)])


class Backwards(nn.Module):
    """A side whose tokens see those after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.embed(input_ids).flip(1).cumsum(1).flip(1)
        return out


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
def test_tasks_on_a_decoder_do_not_depend_on_padding(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path, kind)
    model = st.SideTuner(base)
    for task, problem, head in (("topic", "classes", 3), ("score", "numbers", 1), ("tokens", None, "tokens")):
        options = {"outputs": 4} if head == "tokens" else None
        model.add_task(task, side="ladder", head=head, problem=problem, head_options=options)
    assert type(model["tokens"].problem).__name__ == "Tokens"
    told = model.forward_all(text(IDS))
    for before, after in ((4, 0), (0, 4), (2, 1)):
        found = model.forward_all(text(IDS, before, after))
        found["tokens"] = found["tokens"][:, before : before + 7]
        assert all(torch.allclose(found[task], told[task], atol=1e-5) for task in told), (before, after)
    ragged = text(IDS, before=2)
    ragged["attention_mask"][1, 2:5] = 0
    assert torch.allclose(model(ragged, "topic")[1], model(text(IDS[1:2, 3:]), "topic")[0], atol=1e-5)
    with pytest.raises(st.ShapeError, match="whole texts"):
        model({**text(IDS), "past_key_values": object()}, "topic")


def test_a_checkpoint_without_the_output_embedding_writes_where_it_is_tied(tmp_path: Path) -> None:
    for kind, tied in (("gpt2", True), ("llama", False)):
        net = network(kind)
        net.base_model.save_pretrained(tmp_path / kind)
        bare = st.load_base(f"hf:{tmp_path / kind}")
        assert bare.causal and (bare.lm is not None) is tied
        net.save_pretrained(tmp_path / "whole")
        assert bare.identity() == st.load_base(f"hf:{tmp_path / 'whole'}").identity()
    drawn = st.load_base(f"hf:{tmp_path / 'gpt2'}", pretrained=False)
    assert drawn.causal and drawn.lm is not None
    half = st.load_base(f"hf:{tmp_path / 'gpt2'}", dtype="bfloat16", taps=["h.0"])
    model = st.SideTuner(half)
    model.add_task("style", side="ladder", head="lm")
    net = network("gpt2").bfloat16()
    assert torch.equal(model(text(IDS), "style"), net(**text(IDS)).logits.float())
    assert torch.equal(model.generate(IDS, "style", max_new_tokens=4), net.generate(IDS, max_new_tokens=4))


def next_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def test_next_tokens_are_learned_and_counted_as_transformers_does(base: st.Base) -> None:
    model = learned(base, ["each"])
    labels = IDS.clone()
    labels[0, 3] = -100
    found = st.evaluate(model, "each", [(text(IDS), labels)])
    logits = model(text(IDS), "each").detach()
    counted = next_losses(logits, labels.clamp(min=0))[(labels[:, 1:] != -100).flatten()]
    assert found["loss"] == pytest.approx(float(counted.mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float(counted.mean().exp()), rel=1e-5)
    assert base.lm is not None
    assert found["loss"] == pytest.approx(float(base.lm.net.loss_function(logits, labels, 50)), rel=1e-5)
    # Padding on either side counts for nothing, whatever stands in it.
    for before, after in ((3, 0), (0, 3)):
        batch = text(IDS, before, after)
        padded = st.evaluate(model, "each", [(batch, F.pad(labels, (before, after), value=7))])
        assert padded["loss"] == pytest.approx(found["loss"], rel=1e-5)
        assert padded["accuracy"] == found["accuracy"]
    # Averages run over tokens, not over texts or batches.
    parts = [(text(IDS[:1]), labels[:1]), (text(IDS[1:, :3]), labels[1:, :3])]
    mean = [next_losses(model(x, "each").detach(), y.clamp(min=0))[(y[:, 1:] != -100).flatten()] for x, y in parts]
    assert st.evaluate(model, "each", parts)["loss"] == pytest.approx(float(torch.cat(mean).mean()), rel=1e-5)
    assert st.evaluate(model, "each", [(text(IDS[:, :1]), IDS[:, :1])])["loss"] == 0
    with pytest.raises(st.DataError, match="give the input_ids as targets"):
        st.fit(model, "each", [(text(IDS), IDS[:, 1:])], progress=False)
    st.fit(model, "each", [(text(IDS), IDS)], steps=30, lr=5e-3, progress=False)
    assert next_losses(model(text(IDS), "each"), IDS).mean() < 0.8 * next_losses(logits, IDS).mean()
    assert not any(parameter.requires_grad for parameter in base.lm.net.parameters())


def test_cached_taps_train_as_live_ones(base: st.Base, tmp_path: Path) -> None:
    lines, models = Lines(6), []
    cached = cache_tokens(base, lines, None, tmp_path, dtype="float32", progress=False)
    batches = [cached.__getitems__(rows) for rows in ([0, 1, 2], [3, 4, 5])]
    assert torch.equal(batches[0][2], batches[0][0]["input_ids"])
    for loader in (batches, [(x, y) for x, _, y in batches]):
        model = st.SideTuner(base)
        model.add_task("style", side="ladder", head="lm", seed=0)
        st.fit(model, "style", loader, steps=6, progress=False)
        models.append(model)
    live, kept = (dict(model["style"].named_parameters()) for model in models)
    assert all(torch.allclose(live[name], kept[name], atol=1e-5) for name in live)
    assert live["side.fit.project.bias"].abs().min() > 0


def test_a_task_is_saved_without_the_embedding_and_knows_it(folder: Path, base: st.Base, tmp_path: Path) -> None:
    model = learned(base)
    model.save(tmp_path / "model")
    again = st.load(tmp_path / "model")
    assert set(again.tasks) == set(model.tasks)
    for task in SIDES:
        assert torch.equal(again(text(IDS), task), model(text(IDS), task))
    assert torch.equal(
        again.generate(IDS, list(SIDES), max_new_tokens=4), model.generate(IDS, list(SIDES), max_new_tokens=4)
    )
    kept = tmp_path / "model/tasks/each"
    written: dict[str, Any] = {"model": again}
    exec(asking(read_task(kept)[0]), written)
    assert isinstance(written["text"], str)
    size = sum(parameter.numel() for parameter in model["each"].parameters())
    assert (kept / "side.safetensors").stat().st_size < 4 * size + 8000
    assert json.loads((kept / "side.json").read_text())["parts"]["head"][1].keys() == {"sha256"}
    # The same backbone with another output embedding is another base for what writes, and for nothing else.
    net = network("llama")
    net.save_pretrained(tmp_path / "llama")
    other = learned(st.load_base(f"hf:{tmp_path / 'llama'}", taps=["layers.0"]), ["each"])
    other.save_task("each", tmp_path / "task")
    net.lm_head.weight.data += 1
    net.save_pretrained(tmp_path / "changed")
    changed = st.SideTuner(st.load_base(f"hf:{tmp_path / 'changed'}", taps=["layers.0"]))
    assert changed.base.identity() == other.base.identity()
    with pytest.raises(st.ArtifactError, match="another output embedding"):
        changed.load_task(tmp_path / "task")
    changed.load_task(tmp_path / "task", any_base=True)
    lazily = st.load(tmp_path / "model", max_tasks_in_memory=2)
    assert torch.equal(lazily.generate(IDS, "own", max_new_tokens=4), model.generate(IDS, "own", max_new_tokens=4))


def test_a_copy_of_a_task_shares_the_base_and_one_of_a_model_does_not(base: st.Base) -> None:
    model = learned(base, ["each"])
    head: Any = copy.deepcopy(model["each"]).head
    assert head.model is base.lm
    whole = copy.deepcopy(model)
    head = whole["each"].head
    assert head.model is whole.base.lm is not base.lm
    assert whole.base.lm is not None and whole.base.lm.backbone is whole.base.net
    whole.to(torch.float64)
    assert model(text(IDS), "each").dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tasks_on_a_decoder_are_exported(base: st.Base, tmp_path: Path) -> None:
    model = learned(base, ["each"])
    model.add_task("topic", side="ladder", head=3)
    assert st.export(model, tmp_path / "graphs", format="torch").difference < 1e-4


def test_a_lateral_and_a_merge_of_ones_own_write_too(base: st.Base) -> None:
    model = learned(base, ["back"])
    model.add_task("late", side="ladder", head="lm", merge="sum", laterals=["back"], seed=1)
    model.add_task("mine", side="ladder", head="lm", merge=Halves(), seed=2)
    for task in ("late", "mine"):
        told = greedy(model, IDS, task, 5)
        assert torch.equal(model.generate(IDS, task, max_new_tokens=5), told)
    model.to(torch.float64)
    assert model(text(IDS), "late").dtype == torch.float64


class Halves(nn.Module):
    """A merge."""

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        return 0.5 * (base + side)
