"""Preference optimization on many processes: data, ZeRO and tensor parallelism leave the log and the weights of one."""

import json
from pathlib import Path

import pytest
import torch

import checkpoint
import stages
import train_dpo
from data.tokenizer import BPETokenizer
from logprobs import by_length
from model import CausalLM, ModelConfig
from processes import run_on
from stages import assert_close_logs, assert_close_weights, run_stage

SETTINGS = {"seq_len": 48, "global_batch_size": 8, "micro_batch_size": 3, "max_steps": 3, "warmup_steps": 0,
            "log_every": 1, "eval_every": 2, "save_every": 2, "keep_last": 0, "device": "cpu", "dtype": "float64",
            "lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, another one as reference, and pairs of answers of uneven lengths."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = BPETokenizer.train(["user says hi, assistant adds 1 and 2. " * 30], 279)  # 281 with the template's
    for seed, name in enumerate(("base", "other")):
        (folder / name).mkdir()
        config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, max_position_embeddings=48, attention_dropout=0.5)
        checkpoint.save_model(folder / name, CausalLM(config, seed), tokenizer)
    pairs = [{"prompt": f"{a}+{b}", "chosen": "no " * (a % 3) + str(a), "rejected": str(a + b) + " yes" * (b % 4)}
             for a in range(8) for b in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def settings_of(folder: Path, out: str, **changes) -> dict:
    return SETTINGS | {"model": folder / "base", "data": folder / "pairs.jsonl", "out": str(folder / out)} | changes


@pytest.fixture(scope="module")
def alone(folder):
    """One process's run with some flags, made once for all tests: alone(**flags)."""
    made = {}

    def run(**changes) -> Path:
        key = json.dumps(changes, sort_keys=True, default=str)
        if key not in made:
            made[key] = run_stage(train_dpo.main, settings_of(folder, f"alone{len(made)}", **changes))
        return made[key]

    return run


def on(world: int, settings: dict) -> Path:
    run_on(world, stages.as_rank, "train_dpo", settings, timeout=120)
    return Path(settings["out"])


LAYOUTS = [  # processes, flags for the layout, flags of the run
    (4, dict(tp=2, zero=1), dict()), (4, dict(tp=2, zero=1), dict(reference="online")),
    (2, dict(tp=2, sequence_parallel=True), dict(loss_type="ipo")),
    (4, dict(zero=3, offload=True), dict(loss_type="orpo")),
    (2, dict(zero=2), dict(nll_weight=0.2, reference="online")),
    (4, dict(tp=2, zero=3), dict(ref_model="other", reference="online")),
    (4, dict(engine="torch", tp=2, zero=3, sequence_parallel=True), dict(ref_model="other", reference="online")),
    (2, dict(engine="torch", zero=1), dict(nll_weight=0.2)), (2, dict(engine="torch", tp=2), dict(loss_type="ipo")),
]


@pytest.mark.parametrize("world, layout, flags", LAYOUTS, ids=str)
def test_layouts_leave_the_log_and_the_weights_of_one_process(folder, alone, world, layout, flags):
    """Losses, gradient norms, rewards, margins, accuracies, evaluations, of a reference scored before or beside."""
    name = f"run{LAYOUTS.index((world, layout, flags))}"
    flags = flags | ({"ref_model": folder / flags["ref_model"]} if "ref_model" in flags else {})
    truth = alone(**flags | {"reference": "precomputed"})
    run = on(world, settings_of(folder, name, **flags, **layout))
    assert {"chosen_reward", "rejected_reward", "margin", "accuracy", "kl"} <= stages.rows(run)[0].keys()
    assert_close_logs(run, truth)
    assert_close_weights(run, truth)


LORA = dict(lora_r=4, schedule="constant")


@pytest.mark.parametrize("world, layout, flags", [
    (2, dict(zero=1), dict(reference="online")), (4, dict(zero=3), dict(reference="online")), (2, dict(), dict(load_in="nf4")),
], ids=str)
def test_the_reference_is_the_model_with_its_adapters_off(folder, alone, world, layout, flags):
    packed = {name: flag for name, flag in flags.items() if name == "load_in"}
    truth = alone(**LORA, **packed)
    run = on(world, settings_of(folder, f"adapters{world}{len(layout)}{len(packed)}", **LORA, **layout, **flags))
    tolerance = 1e-6 if packed else 1e-9  # adapters of rounded layers are float32
    assert stages.losses(run)[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
    assert_close_logs(run, truth, tolerance)
    assert_close_weights(run, truth, "adapter_model.safetensors", tolerance)


@pytest.mark.parametrize("lora_r, weights", [(0, "model"), (4, "adapter_model")])
def test_resumed_at_other_layouts_as_if_undisturbed(folder, lora_r, weights):
    settings = dict(max_steps=4, save_every=1, schedule="constant", lora_r=lora_r)
    truth = run_stage(train_dpo.main, settings_of(folder, f"undisturbed{lora_r}", **settings))
    first = dict(zero=2) if lora_r else dict(tp=2, zero=1)
    for world, steps, layout in ((4, 1, first), (1, 2, {}), (2, 3, dict(zero=3)), (1, 4, {})):
        now = settings_of(folder, f"moved{lora_r}", **settings | layout | dict(max_steps=steps, resume="auto"))
        on(world, now) if world > 1 else run_stage(train_dpo.main, now)
    moved = [row for row in stages.lasting(folder / f"moved{lora_r}") if row["kind"] == "train"]
    assert len(moved) == 4
    for a, b in zip(moved, (row for row in stages.lasting(truth) if row["kind"] == "train")):
        assert all(a[key] == pytest.approx(b[key], abs=1e-9) for key in b if key != "kind"), (a, b)
    assert_close_weights(folder / f"moved{lora_r}", truth, f"{weights}.safetensors")


def test_float16_scales_its_loss_on_every_rank(folder, alone):
    settings = dict(dtype="float16", max_steps=6, eval_every=0, lr=1e-3)
    truth, run = alone(**settings), on(2, settings_of(folder, "half", **settings, zero=2))
    scales = [checkpoint.read_state(checkpoint.latest(r))["loss_scale"] for r in (truth, run)]
    assert scales[0] == scales[1] and stages.losses(run) == pytest.approx(stages.losses(truth), abs=1e-3)
    norms = [[row["grad_norm"] for row in stages.rows(r)] for r in (truth, run)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_each_rank_takes_pairs_of_like_length():
    """Dealt out in the order of their lengths: no rank has all the long ones, and each as many."""
    class Item:
        def __init__(self, length):
            self.length = length

    items = [Item(n) for n in (9, 1, 8, 2, 7, 3, 6, 4)]
    lots = [by_length(range(8), items, 3, rank, 2) for rank in range(2)]
    assert [[[items[k].length for k in lot] for lot in rank] for rank in lots] == [[[1, 3, 6], [8]], [[2, 4, 7], [9]]]
    assert by_length([0, 1, 2], items, 2) == [[1, 2], [0]]


@pytest.mark.parametrize("flags, line", [
    (dict(pp=2), "--pp 2: this stage does not take it"),
    (dict(cp=2), "--cp 2: this stage does not take it"),
    (dict(ep=2), "--ep 2: this stage does not take it"),
    (dict(lora_r=4, engine="torch"), "--engine torch has no adapters: leave out --lora_r"),
    (dict(lora_r=4, tp=2), "--tp 2: cuts or moves layers that --lora_r has wrapped: take --dp, --cp or --zero"),
    (dict(lora_r=4, zero=3, load_in="nf4"), "--zero 3: cuts weights, and those of --load_in are packed: take 1 or 2"),
    (dict(global_batch_size=7), "--global_batch_size 7: no multiple of the 2 data-parallel ranks"),
    (dict(tp=3), "pp 1 x cp 1 x tp 3 do not make 2 processes"),
], ids=str)
def test_what_two_processes_cannot_do_is_one_line(folder, flags, line):
    stages.assert_refused(train_dpo, settings_of(folder, "refused", **flags), processes=2, line=line)


def test_bad_degrees_end_with_one_line_and_code_2(folder):
    stages.assert_bad_degrees_are_one_line("train_dpo.py", settings_of(folder, "refused", tp=2))
