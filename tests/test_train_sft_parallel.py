"""Supervised fine-tuning on many processes: every axis leaves the log and the weights of one process."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoint
import lora
import stages
import train_sft
from data.loader import eval_batches
from data.tokenizer import BPETokenizer
from model import CausalLM, ModelConfig
from processes import run_on
from stages import compiled, run_stage

SETTINGS = {"seq_len": 48, "global_batch_size": 8, "micro_batch_size": 1, "max_steps": 3, "warmup_steps": 1,
            "log_every": 1, "eval_every": 2, "save_every": 2, "keep_last": 0, "sample_tokens": 3, "device": "cpu",
            "dtype": "float64", "lr": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, tied and with experts; conversations, several of which share a row, and such that each fills one."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = BPETokenizer.train(["user says hi, assistant adds 1 and 2. " * 30], 279)  # 281 with the template's
    for name, more in (("base", dict(tie_word_embeddings=True)),
                       ("experts", dict(num_experts=4, moe_intermediate_size=8, router_aux_loss_coef=0.1))):
        (folder / name).mkdir()
        config = ModelConfig(tokenizer.vocab_size, 32, 48, 4, 4, 2, max_position_embeddings=48, **more)
        checkpoint.save_model(folder / name, CausalLM(config), tokenizer)
    for name, text in (("short", ""), ("long", " and says it once more, slowly, at length" * 2)):
        chats = [[{"role": "user", "content": f"{a}+{b}{text}"}, {"role": "assistant", "content": str(a + b)}]
                 for a in range(8) for b in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return folder


def settings_of(folder: Path, out: str, model: str = "base", data: str = "short", **changes) -> dict:
    return SETTINGS | {"model": folder / model, "data": folder / f"{data}.jsonl", "out": str(folder / out)} | changes


@pytest.fixture(scope="module")
def alone(folder):
    """One process's run with some flags, made once for all tests: alone(**flags)."""
    made = {}

    def run(**changes) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = run_stage(train_sft.main, settings_of(folder, f"alone{len(made)}", **changes))
        return made[key]

    return run


def on(world: int, settings: dict) -> Path:
    run_on(world, stages.as_rank, "train_sft", settings, timeout=120)
    return Path(settings["out"])


def assert_same(run, truth, weights: str = "model.safetensors", tolerance: float = 1e-9) -> None:
    stages.assert_close_logs(run, truth, tolerance)
    stages.assert_close_weights(run, truth, weights, tolerance)


LAYOUTS = [  # processes, flags for the layout, flags of the run
    (4, dict(tp=2, pp=2), dict(neftune_alpha=5.0, prompt_loss_weight=0.3)),  # no rank has data of its own: same noise
    (2, dict(tp=2, sequence_parallel=True), dict(neftune_alpha=5.0, prompt_loss_weight=0.3)),
    (2, dict(), dict(prompt_loss_weight=0.3)),
    (4, dict(tp=2, zero=2), dict(data="long")),
    (4, dict(cp=2, zero=1), dict(prompt_loss_weight=0.3)),
    (4, dict(zero=3, offload=True), dict(prompt_loss_weight=0.3)),
    (2, dict(ep=2, zero=1), dict(model="experts")),
    (4, dict(engine="torch", tp=2, pp=2), dict(neftune_alpha=5.0, prompt_loss_weight=0.3)),
    (2, dict(engine="torch", tp=2, sequence_parallel=True), dict(neftune_alpha=5.0, prompt_loss_weight=0.3)),
    (4, dict(engine="torch", tp=2, zero=2), dict(data="long")),
    (4, dict(engine="torch", zero=3, offload=True), dict(prompt_loss_weight=0.3)),
]


@pytest.mark.parametrize("world, layout, flags", LAYOUTS, ids=str)
def test_every_axis_leaves_the_log_and_the_weights_of_one_process(folder, alone, world, layout, flags):
    truth = alone(**flags)
    assert_same(on(world, settings_of(folder, f"run{LAYOUTS.index((world, layout, flags))}", **flags, **layout)), truth)


def test_the_rows_that_are_tried_are_packed_and_unpacked(folder, alone):
    for name, packed in (("short", True), ("long", False)):
        run = alone(prompt_loss_weight=0.3) if packed else alone(data="long")
        index = json.loads((run / "data" / "index.json").read_text())["splits"]["train"]
        assert (index["tokens"] // 48 < index["conversations"] / 2) is packed


def test_torch_s_pipeline_with_replayed_text_and_uneven_held_out_batches(folder):
    """Microbatches of a pipeline are of one shape; those of the evaluation need not be."""
    (folder / "replay.txt").write_text("two and two are four, and " * 400)
    settings = dict(replay=folder / "replay.txt", replay_fraction=0.5, prompt_loss_weight=0.3, micro_batch_size=2,
                    val_fraction=0.2)
    truth = run_stage(train_sft.main, settings_of(folder, "replayed", **settings))
    shapes = [tuple(ids.shape) for ids, *_ in eval_batches(truth / "data", "val", 48, 2)]
    assert shapes == [(2, 48), (1, 48)]
    engine = dict(engine="torch", pp=2, zero=1, pp_schedule="zb")
    assert_same(on(2, settings_of(folder, "replayed2", **settings, **engine)), truth)


def test_noise_differs_along_dp_and_is_the_same_again_after_a_resume(folder, alone):
    settings = dict(neftune_alpha=5.0, eval_every=0, schedule="constant")
    whole = on(2, settings_of(folder, "noisy", **settings))
    on(2, settings_of(folder, "noisy again", **settings, max_steps=2))
    again = on(2, settings_of(folder, "noisy again", **settings, resume="auto"))
    stages.assert_close_logs(again, whole)
    assert stages.losses(again) == stages.losses(whole)
    weights = [(checkpoint.latest(run) / "model.safetensors").read_bytes() for run in (whole, again)]
    assert weights[0] == weights[1]
    one = stages.losses(alone(neftune_alpha=5.0, prompt_loss_weight=0.0))
    assert 1e-6 < max(abs(a - b) for a, b in zip(stages.losses(whole), one)) < 0.05  # other draws of the same noise


def test_noise_has_the_bound_of_the_whole_row_where_a_rank_has_a_part():
    """NEFTune's bound falls with the length; with the length of the part it would be sqrt(shares) too loud."""
    ids = torch.zeros(2, 8, dtype=torch.int64)
    part = torch.zeros(2, 4, 16)  # of 8 positions, of which 32 are the row under cp 4
    noises = []
    for rank in range(2):
        torch.manual_seed(0)
        module = torch.nn.Module().train()
        noises.append(train_sft.neftune(5.0, 32, rank)(module, (ids,), part))
    torch.manual_seed(0)
    together = train_sft.neftune(5.0, 32)(module, (ids,), torch.zeros(2, 8, 16))
    assert torch.equal(torch.cat(noises, 1), together)
    bound = 5.0 / math.sqrt(32 * 16)
    assert 0.9 * bound < together.abs().max().item() <= bound


def below_one(world, folder, ids, labels, engine):
    """A rank's loss of its rows, and what they all count."""
    import parallel
    from parallel.mesh import Mesh
    mesh, model = Mesh(world), checkpoint.load_model(folder / "base", dtype=torch.float64)
    run = parallel.parallelize(model, mesh, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
                               weigh=partial(train_sft.weigh, prompt_weight=0.1), engine=engine)
    ids, labels = (x.chunk(world)[mesh.rank("dp")] for x in (ids, labels))
    weight = float(run.total(train_sft.weight_of(labels, 0.1)))
    return run.backward([(ids, labels, None)], weight).item(), weight


def test_a_batch_that_counts_less_than_one_token_is_divided_by_what_it_counts(folder):
    """Prompts alone, two tokens at 0.1: as in one process, the divisor is 0.2, not 1."""
    ids, labels = torch.arange(12).view(2, 6), torch.full((2, 6), -100)
    labels[0, 1], labels[1, 3] = -101 - 7, -101 - 9
    model, weight = checkpoint.load_model(folder / "base", dtype=torch.float64), train_sft.weight_of(labels, 0.1)
    truth = train_sft.batch_loss(model, ids, labels, None, torch.tensor(weight, dtype=torch.float64), 0.1).item()
    found = [below_one(1, folder, ids, labels, "scratch"), *run_on(2, below_one, folder, ids, labels, "scratch"),
             *run_on(2, below_one, folder, ids, labels, "torch")]
    assert weight == pytest.approx(0.2) and truth > 4
    assert all(loss == pytest.approx(truth, abs=1e-12) and counted == pytest.approx(0.2) for loss, counted in found)


def test_resumed_at_other_layouts_as_if_undisturbed(folder):
    settings = dict(max_steps=4, save_every=1, eval_every=0, schedule="constant", warmup_steps=0, prompt_loss_weight=0.3)
    truth = run_stage(train_sft.main, settings_of(folder, "undisturbed", **settings))
    for world, steps, layout in ((4, 1, dict(tp=2, pp=2)), (2, 2, dict(zero=3)), (1, 3, {}), (2, 4, dict(pp=2, engine="torch"))):
        now = settings_of(folder, "moved", **settings | layout | dict(max_steps=steps, resume="auto"))
        on(world, now) if world > 1 else run_stage(train_sft.main, now)
    assert_same(folder / "moved", truth)


# ---- compiled

LORA = dict(lora_r=4, lr=1e-2, eval_every=0, schedule="constant", warmup_steps=0)


@pytest.mark.parametrize("world, layout, flags", [
    (2, dict(activation_checkpointing="full"), dict(prompt_loss_weight=0.3)), (4, dict(zero=3), LORA),
    (4, dict(tp=2, zero=2, sequence_parallel=True), dict(data="long")), (2, dict(pp=2), dict(data="long")),
    (4, dict(zero=3, offload=True), dict(prompt_loss_weight=0.3)), (2, dict(engine="torch", pp=2), dict(data="long")),
    (2, dict(engine="torch", zero=3, activation_checkpointing="full"), dict(prompt_loss_weight=0.3))], ids=str)
def test_compiled_layers_leave_the_log_and_the_weights_of_one_process(folder, alone, world, layout, flags):
    """One graph serves all layers, unbroken by what gathers their weights and sums their gradients."""
    settings = settings_of(folder, f"compiled {world} {layout} {len(flags)}", **flags, **layout, compile=True)
    ranks = run_on(world, compiled, stages.as_rank, "train_sft", settings, timeout=120)
    assert ranks == [(None, 1, [])] * world
    assert_same(settings["out"], alone(**flags), f"{'adapter_' if 'lora_r' in flags else ''}model.safetensors")


def kept_for_backward(world, folder, compile) -> tuple[int, int]:
    """Bytes that a microbatch keeps beside the units' gathered weights, and how many tensors are views of those."""
    import parallel
    from optim import build_optimizer
    from parallel.mesh import Mesh
    mesh, beside, within = Mesh(), {}, []
    run = parallel.parallelize(checkpoint.load_model(folder / "base", dtype=torch.float64).train(), mesh,
                               partial(build_optimizer, "adamw", lr=0.1, weight_decay=0.0), zero=3, compile=compile)
    gathered = {unit.flat.untyped_storage()._cdata for unit in run.sync.units}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata in gathered:
            within.append(x)
        else:
            beside[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ids = torch.arange(96).view(2, 48)
        run.backward([(ids, ids, None)], 96)
    return sum(beside.values()), len(within)


def test_compiled_layers_keep_no_copy_of_weights_that_zero_3_frees(folder):
    (plain, views), ((fused, same), _, _) = (run_on(2, *job)[0] for job in (
        (kept_for_backward, folder, False), (compiled, kept_for_backward, folder, True)))
    assert views == same > 4 * 7 and fused <= plain


# ---- adapters


@pytest.mark.parametrize("world, flags", [(2, dict(load_in="nf4", zero=1)), (4, dict(zero=3)), (4, dict(cp=2))], ids=str)
def test_adapters_alone_are_trained_and_saved_as_by_one_process(folder, alone, world, flags):
    """The template's new tokens are trained whole, in tied copies."""
    truth = alone(**LORA | {name: flag for name, flag in flags.items() if name == "load_in"})
    run = on(world, settings_of(folder, f"adapters{world}{len(flags)}{flags.get('cp', '')}", **LORA, **flags))
    assert_same(run, truth, "adapter_model.safetensors", 1e-6 if "load_in" in flags else 1e-9)  # there they are float32
    configs = [(checkpoint.latest(r) / "adapter_config.json").read_text() for r in (run, truth)]
    assert configs[0] == configs[1]
    index = json.loads((run / "step_00000002" / "index.json").read_text())
    assert all("lora_" in name or "modules_to_save" in name for name in index["model"])  # not the frozen base
    assert len(index["optimizer"]) == 2 * len(index["model"])  # AdamW's, of these alone


def test_adapters_are_resumed_at_other_layouts_as_if_undisturbed(folder):
    settings = LORA | dict(max_steps=4, save_every=1)
    truth = run_stage(train_sft.main, settings_of(folder, "adapters undisturbed", **settings))
    for world, steps, layout in ((1, 1, {}), (2, 2, dict(zero=1)), (4, 3, dict(zero=3)), (1, 4, {})):
        now = settings_of(folder, "adapters moved", **settings | layout | dict(max_steps=steps, resume="auto"))
        on(world, now) if world > 1 else run_stage(train_sft.main, now)
    assert_same(folder / "adapters moved", truth, "adapter_model.safetensors")


def test_a_checkpoint_of_adapters_opens_as_the_merged_model_or_says_what_it_is(folder):
    from convert import load_pretrained
    run = on(2, settings_of(folder, "opened", **LORA))
    assert not lora.adapted(load_pretrained(run))
    with pytest.raises(ValueError, match="shards of adapters alone, for --resume"):
        load_pretrained(run / "step_00000002")


# ---- what is refused


@pytest.mark.parametrize("flags, line", [
    (dict(tp=2), "pp 1 x cp 1 x tp 2 do not make 1 processes"),
    (dict(lora_r=4, zero=3, load_in="nf4"), "--zero 3: cuts weights, and those of --load_in are packed: take 1 or 2"),
    (dict(offload=True), "--offload True: moves ZeRO's part of the state"),
    (dict(engine="torch"), "--engine torch: needs processes"), (dict(zero=4), "--zero 4: choose 0, 1, 2 or 3"),
    (dict(dp=2), "dp 2 x pp 1 x cp 1 x tp 1 do not make 1 processes"),
], ids=str)
def test_what_one_process_cannot_do_is_one_line(folder, flags, line):
    with pytest.raises(ValueError) as error:
        run_stage(train_sft.main, settings_of(folder, "refused", **flags))
    assert line in str(error.value) and "\n" not in str(error.value) and not (folder / "refused").exists()


@pytest.mark.parametrize("flags, line", [
    (dict(lora_r=4, tp=2), "--tp 2: cuts or moves layers that --lora_r has wrapped: take --dp, --cp or --zero"),
    (dict(lora_r=4, pp=2, pp_schedule="interleaved", pp_chunks=2), "--pp 2: cuts or moves layers"),
    (dict(lora_r=4, ep=2), "--ep 2: cuts or moves layers"),
    (dict(lora_r=4, engine="torch"), "--engine torch has no adapters: leave out --lora_r"),
    (dict(compile=True, cp=2), "--compile True: stops at each message of --cp and --ep: take --dp, --zero, --tp or --pp"),
    (dict(compile=True, pp=2, pp_schedule="zb"), "--compile True: joins what --pp_schedule zb takes apart: take gpipe"),
    (dict(compile=True, zero=1, activation_checkpointing="selective"), "hides from --activation_checkpointing what it"),
    (dict(compile=True, tp=2, engine="torch"), "--engine torch gives DTensors to --compile under --tp"),
    (dict(pp=2, micro_batch_size=3, engine="torch"), "takes equal microbatches under --pp: 3 does not divide a rank's 8"),
    (dict(global_batch_size=7), "--global_batch_size 7: no multiple of the 2 data-parallel ranks"),
    (dict(cp=2, cp_method="ring", seq_len=46), "--seq_len 46: no multiple of 2 x --cp, 4"),
], ids=str)
def test_what_two_processes_cannot_do_is_one_line(folder, flags, line):
    stages.assert_refused(train_sft, settings_of(folder, "refused", **flags), processes=2, line=line)


def test_bad_degrees_end_with_one_line_and_code_2(folder):
    stages.assert_bad_degrees_are_one_line("train_sft.py", settings_of(folder, "refused", tp=2))
