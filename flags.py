"""What the command lines of the stages share: the ranges of their numbers, and the shapes that --preset names."""

import math

AT_LEAST_1 = ("seq_len", "global_batch_size", "micro_batch_size", "max_steps", "log_every")
AT_LEAST_0 = ("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "spike_threshold", "early_stopping",
              "eval_every", "save_every", "keep_last", "sample_tokens", "prompt_loss_weight", "neftune_alpha", "gamma",
              "nll_weight", "lora_r", "lora_alpha")
BELOW_1 = ("beta1", "beta2", "replay_fraction")

PRESETS = {  # named after the size with the vocabulary that usually goes with the shape
    name: dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "rope_theta", "qk_norm", "tie_word_embeddings"), shape)) for name, shape in {
        "1m": (128, 352, 4, 4, 2, 1e4, True, True),
        "10m": (320, 864, 7, 5, 5, 1e4, True, True),
        "124m": (768, 2048, 12, 12, 12, 1e4, False, True),
        "350m": (1024, 2752, 24, 16, 16, 1e4, False, True),
        "1b": (2048, 8192, 16, 32, 8, 5e5, False, True),    # Llama 3.2 1B
        "3b": (3072, 8192, 28, 24, 8, 5e5, False, True),    # Llama 3.2 3B
        "8b": (4096, 14336, 32, 32, 8, 5e5, False, False),  # Llama 3 8B
    }.items()}


def check_ranges(args) -> None:
    """ValueError with one line for a number that cannot be, of the flags above that a stage's Args has."""
    for names, fits, rule in ((AT_LEAST_1, lambda x: x >= 1, "must be at least 1"),
                              (AT_LEAST_0, lambda x: 0 <= x < math.inf, "must be at least 0"),
                              (BELOW_1, lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
                              (("val_fraction",), lambda x: 0 < x < 1, "must lie between 0 and 1")):
        for name in names:
            if hasattr(args, name) and not fits(getattr(args, name)):
                raise ValueError(f"--{name} {getattr(args, name)}: {rule}")
