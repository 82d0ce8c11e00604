"""The stages with --lora_r and --load_in: what they save, resume and hand on."""

import json

import pytest
import torch

import checkpoint
import lora
import train_dpo
import train_sft
from convert import load_pretrained
from stages import losses, run_stage
from test_train_dpo import TINY as DPO
from test_train_dpo import base, pairs  # noqa: F401 (fixtures)

SFT = {"seq_len": 48, "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 6, "warmup_steps": 0, "log_every": 1,
       "eval_every": 3, "save_every": 3, "device": "cpu", "lr": 1e-2, "sample_tokens": 4, "schedule": "constant"}
LN2 = float(torch.tensor(2.0).log())  # as float32 has it


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [[{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]
            for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("load_in", [None, "nf4", "int8"])
def test_sft_trains_saves_and_resumes_adapters_alone(base, chats, tmp_path, load_in):
    settings = SFT | {"model": base, "data": chats, "lora_r": 4, "load_in": load_in}
    before = (base / "model.safetensors").read_bytes()
    whole = run_stage(train_sft.main, settings | {"out": tmp_path / "whole"})
    assert losses(whole)[-1] < losses(whole)[0] and (base / "model.safetensors").read_bytes() == before
    run_stage(train_sft.main, settings | {"out": tmp_path / "cut", "max_steps": 3})
    cut = run_stage(train_sft.main, settings | {"out": tmp_path / "cut", "resume": "auto"})
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (checkpoint.latest(cut) / name).read_bytes() == (checkpoint.latest(whole) / name).read_bytes()
    config, tensors = lora.read_peft(checkpoint.latest(whole))
    assert not (checkpoint.latest(whole) / "model.safetensors").exists()
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"]  # the template brought new tokens
    assert config["base_model_name_or_path"] == str(base.resolve())
    optimizer = checkpoint.read_safetensors(checkpoint.latest(whole) / "optimizer.safetensors")
    assert sum(t.numel() for t in optimizer.values()) == 2 * sum(t.numel() for t in tensors.values())  # AdamW's, of adapters


def test_an_adapter_s_folder_opens_as_the_merged_model(base, chats, tmp_path):
    run = run_stage(train_sft.main, SFT | {"model": base, "data": chats, "lora_r": 4, "out": tmp_path / "run"})
    merged = load_pretrained(run)
    assert not lora.adapted(merged) and all(p.requires_grad for p in merged.parameters())
    apart = checkpoint.load_model(base)
    checkpoint.grow_vocabulary(apart, merged.config.vocab_size)
    ids = torch.randint(0, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    untouched = apart(ids)
    lora.load_adapter(apart, checkpoint.latest(run))
    assert torch.allclose(merged(ids), apart(ids), atol=1e-5) and not torch.allclose(merged(ids), untouched, atol=1e-3)
    config = checkpoint.latest(run) / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base.resolve()), "some/hub-name"))
    (checkpoint.latest(run) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="an adapter of 'some/hub-name', and there is no such folder here"):
        checkpoint.open_model(checkpoint.latest(run))


@pytest.mark.parametrize("reference", ["precomputed", "online"])
def test_dpo_s_reference_is_the_model_with_its_adapters_off(base, pairs, chats, tmp_path, reference):
    settings = DPO | {"model": base, "data": pairs, "lora_r": 4, "reference": reference}
    one = run_stage(train_dpo.main, settings | {"out": tmp_path / "one"})
    two = run_stage(train_dpo.main, settings | {"out": tmp_path / "two", "ref_model": base})  # a second model in memory
    assert losses(one) == losses(two) and losses(one)[0] == LN2 and losses(one)[-1] < LN2
    on_top = run_stage(train_dpo.main, settings | {"model": one, "out": tmp_path / "three", "lora_r": 2, "load_in": "nf4"})
    assert losses(on_top)[0] == LN2
    assert lora.read_peft(checkpoint.latest(on_top))[0]["base_model_name_or_path"] == str(checkpoint.latest(one).resolve())
    checkpoint.open_model(on_top)  # an adapter of an adapter of the base


def test_flags_that_do_not_go_together_are_refused(base, pairs, chats, tmp_path):
    settings = DPO | {"model": base, "data": pairs, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="--load_in nf4: rounded weights stay as they are: add adapters"):
        run_stage(train_dpo.main, settings | {"load_in": "nf4"})
    with pytest.raises(ValueError, match="'query' matches no linear layer; there are: down_proj"):
        run_stage(train_dpo.main, settings | {"lora_r": 4, "lora_targets": ["query"]})
    run_stage(train_sft.main, SFT | {"model": base, "data": chats, "out": tmp_path / "sft", "lora_r": 4, "lora_alpha": 8.0})
    with pytest.raises(ValueError, match="--lora_r 8: the run in .* was started with 4"):
        run_stage(train_sft.main, SFT | {"model": base, "data": chats, "out": tmp_path / "sft", "lora_r": 8, "lora_alpha": 8.0,
                                         "resume": "auto", "max_steps": 9})
