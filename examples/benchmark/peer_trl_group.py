"""The benchmark's work done by TRL's current GRPOTrainer with peft: adapters of rank 8, groups of four responses.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers datasets accelerate peft
    python examples/benchmark --size deep --batch 32 --config advantages=grpo group_size=4 'lora={"rank": 8}' \\
        kl_placement=loss kl_estimator=k3 loss_averaging=sequences \\
        --peer-command "trl/bin/python examples/benchmark/peer_trl_group.py"

Nothing of ours imported. A random GPT-2 of the size `deep`, prompts of 3 tokens, 16 new tokens, top-p .95; old and
reference log-probabilities, four passes in minibatches of 16. The reward costs nothing. Prints the time of one whole
iteration, after another that warms up.
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import tokenizers
import torch
import transformers

PROMPTS = ["酒店", "周围", "位置", "前台"]
VOCAB, NEW_TOKENS, MINIBATCH, EPOCHS, GROUP = 21128, 16, 16, 4, 4
SIZES = dict(vocab_size=VOCAB, n_embd=512, n_layer=24, n_head=8)
LORA = dict(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="responses an iteration")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    import peft
    import trl
    from datasets import Dataset

    steps = EPOCHS * args.batch // MINIBATCH  # optimizer steps an iteration
    clock = Clock(steps)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=MINIBATCH, gradient_accumulation_steps=1,
            steps_per_generation=args.batch // MINIBATCH, num_iterations=EPOCHS, num_generations=GROUP,
            max_completion_length=NEW_TOKENS, generation_kwargs={"min_new_tokens": NEW_TOKENS}, temperature=1.0,
            top_p=0.95, top_k=0, learning_rate=1e-5, beta=0.04, loss_type="grpo", max_steps=2 * steps, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], logging_strategy="no", save_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused", seed=0,
        )  # fmt: skip
        trl.GRPOTrainer(
            model=transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **no_dropout())),
            reward_funcs=lambda completions, **_: [len(set(text)) / NEW_TOKENS for text in completions],
            args=config, train_dataset=Dataset.from_dict({"prompt": PROMPTS * args.batch}),
            processing_class=characters(), peft_config=peft.LoraConfig(**LORA), callbacks=[clock],
        ).train()  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sample = {"peer": f"trl {trl.__version__} grpo, peft {peft.__version__}", "phase": "iteration"}
    print(json.dumps({**sample, "seconds": clock.times[-1] - clock.times[-2], "peak_mb": peak}), flush=True)


class Clock(transformers.TrainerCallback):
    """The time at the start, and after each iteration of so many optimizer steps."""

    def __init__(self, steps: int):
        self.steps, self.times = steps, []  # type: int, list[float]

    def on_train_begin(self, *unused: Any, **more: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self.steps == 0:
            self.times.append(time.perf_counter())


def no_dropout() -> dict[str, float]:
    return dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def characters() -> transformers.PreTrainedTokenizerFast:
    """A token a character, [CLS] before a text: the benchmark's own prompts have the same 3 tokens."""
    names = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += [chr(c) for c in range(33, 127)]
    names += [chr(0x4E00 + i) for i in range(VOCAB - len(names))]
    ids = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", ids["[CLS]"])])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[SEP]")


if __name__ == "__main__":
    main()
