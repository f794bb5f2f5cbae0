"""The benchmark's work done by TRL 0.11.4, the last with `PPOTrainer.step`, or the way of the original recipe; and its
work in groups, 32 prompts with 4 responses each, by the GRPOTrainer or RLOOTrainer of a new TRL, with peft if asked.

    python3 -m venv trl && trl/bin/pip install torch "numpy<2" transformers==4.45.2 accelerate==0.34.2 \\
        datasets==2.21.0 "pyarrow<18" rich trl==0.11.4
    python examples/benchmark --peer-command "trl/bin/python examples/benchmark/peer_trl.py"
    python examples/benchmark --peer-command "trl/bin/python examples/benchmark/peer_trl.py --way recipe"

    python3 -m venv new && new/bin/pip install torch transformers datasets accelerate peft trl==1.16.0
    python examples/benchmark --config group_size=4 whiten_advantages=false adaptive_kl=false advantages=rloo \\
        --peer-command "new/bin/python examples/benchmark/peer_trl.py --way rloo"    # "--lora 8" for adapters

Nothing of ours is imported. Random models of the same sizes, the same batch; a JSON line a phase. TRL generates and
scores in one batch. `--fused-adam` gives it the faster optimizer; jemalloc comes by LD_PRELOAD. "recipe": one prompt at
a time without a cache, one text at a time, one optimizer step a sample; a sixteenth of the batch is run, and its time
multiplied. "grpo", "rloo": 4 passes in minibatches of 16, without dropout, texts scored in one batch, fused Adam;
generation and classifier are warmed up.
"""

import argparse
import functools
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
import torch
import transformers

VOCAB, BATCH, NEW_TOKENS = 21128, 128, 16
QUERIES = [torch.tensor([101, 200 + i % 4, 300 + i % 4]) for i in range(BATCH)]
RESPONSES = list(torch.randint(198, VOCAB, (BATCH, NEW_TOKENS), generator=torch.Generator().manual_seed(0)))
SCORES = list(torch.rand(BATCH, generator=torch.Generator().manual_seed(1)))
TEXTS = ["酒店" + "".join(chr(0x4E00 + int(t) - 198) for t in r) for r in RESPONSES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=["trl", "recipe", "grpo", "rloo"], default="trl")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of TRL; bf16 by autocast")
    parser.add_argument("--minibatch", type=int, default=16, help="sequences an optimizer step of TRL")
    parser.add_argument("--fused-adam", action="store_true")
    parser.add_argument("--layers", type=int, default=12, help="of both models")
    parser.add_argument("--lora", type=int, metavar="RANK", help="with grpo or rloo: train adapters of this rank")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.fused_adam:  # TRL takes what has this name when it is imported
        torch.optim.Adam = functools.partial(torch.optim.Adam, fused=True)
    transformers.logging.set_verbosity_error()
    {"trl": by_trl, "recipe": by_recipe}.get(args.way, in_groups)(args)


def by_trl(args: argparse.Namespace) -> None:
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    half = args.precision == "bf16"
    tokenizer, classifier = characters(), bert(args.layers)
    policy, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(gpt2(args.layers)) for _ in range(2))
    accelerator = {"cpu": True} | ({"mixed_precision": "bf16"} if half else {})
    config = PPOConfig(learning_rate=2e-6, batch_size=BATCH, mini_batch_size=args.minibatch, ppo_epochs=4,
                       init_kl_coef=0.2, target=6, horizon=10000, gamma=1, lam=0.95, vf_coef=0.1,
                       accelerator_kwargs=accelerator)  # fmt: skip
    trainer = PPOTrainer(config, policy, reference, tokenizer)
    settings = dict(min_length=-1, top_k=0.0, top_p=0.95, do_sample=True, pad_token_id=0, max_new_tokens=NEW_TOKENS,
                    eos_token_id=-1)  # fmt: skip

    def generate() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            trainer.generate(QUERIES, batch_size=BATCH, return_prompt=False, **settings)

    @torch.no_grad()
    def score() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            classifier(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits.float().softmax(-1)

    name = f"trl 0.11.4 {args.precision} minibatch {args.minibatch}{' fused Adam' if args.fused_adam else ''}"
    report(name, "generate", generate)
    report(name, "score", score)
    report(name, "step", lambda: trainer.step(QUERIES, RESPONSES, SCORES), warm_up=False)


def by_recipe(args: argparse.Namespace) -> None:
    n = BATCH // 16
    policy, reference = (gpt2(args.layers) for _ in range(2))
    value_head = torch.nn.Linear(policy.config.n_embd, 1)
    optimizer = torch.optim.Adam([*policy.parameters(), *value_head.parameters()], lr=2e-6)
    classify = transformers.pipeline("sentiment-analysis", model=bert(args.layers), tokenizer=characters(), device=-1)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs > 0.95, 0)
        return order.gather(-1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1))

    @torch.no_grad()
    def generate() -> None:
        for query in QUERIES[:n]:
            ids = query[None]
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, sample(policy(ids, use_cache=False).logits[:, -1])], -1)

    def analyse(model: torch.nn.Module, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.cat([QUERIES[i], RESPONSES[i]])[None]
        out = model(ids, use_cache=False, output_hidden_states=True)
        logprobs = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, -NEW_TOKENS:, 0]
        return logprobs, value_head(out.hidden_states[-1])[0, -NEW_TOKENS - 1 : -1, 0]

    def step() -> None:
        with torch.no_grad():
            old = [analyse(policy, i) for i in range(n)]
            ref = [analyse(reference, i)[0] for i in range(n)]
        for _ in range(4):
            for i in range(n):
                rewards = -0.2 * (old[i][0] - ref[i])
                rewards[-1] += SCORES[i]
                returns = rewards.flip(0).cumsum(0).flip(0)
                advantages = returns - old[i][1]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                logprobs, values = analyse(policy, i)
                ratio = (logprobs - old[i][0]).exp()
                loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
                optimizer.zero_grad()
                (loss + 0.05 * (values - returns).square().mean()).backward()
                optimizer.step()

    for phase, work in (("generate", generate), ("score", lambda: [classify(t) for t in TEXTS[:n]]), ("step", step)):
        report("the original recipe's way", phase, work, warm_up=False, scale=BATCH / n)


def in_groups(args: argparse.Namespace) -> None:
    import trl
    from datasets import Dataset
    from tokenizers.processors import TemplateProcessing

    tokenizer, texts_tokenizer, classifier = characters(), characters(), bert(args.layers)
    tokenizer.eos_token = "[SEP]"
    start = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 101)])
    tokenizer.backend_tokenizer.post_processor = start  # prompts of 3 tokens, as ours
    prompts = tokenizer.batch_decode([query[1:] for query in QUERIES[:32]])

    @torch.no_grad()
    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        texts = [a + b for a, b in zip(prompts, completions, strict=True)]
        batch = texts_tokenizer(texts, return_tensors="pt", padding=True)
        return classifier(**batch).logits.softmax(-1)[:, 1].tolist()

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *_: object, **__: object) -> None:
            name = f"trl {trl.__version__} {args.way}{'' if args.lora is None else ' with LoRA'}"
            told(name, "iteration", time.perf_counter() - self.start)

    kinds = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}
    kind, trainer = kinds[args.way]
    with tempfile.TemporaryDirectory() as folder:
        gpt2(args.layers).save_pretrained(folder)  # TRL loads the reference from the policy's folder
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        config = kind(
            output_dir=folder, per_device_train_batch_size=args.minibatch, steps_per_generation=BATCH // args.minibatch,
            gradient_accumulation_steps=1, num_iterations=4, max_steps=4 * BATCH // args.minibatch, num_generations=4,
            max_completion_length=NEW_TOKENS, top_p=0.95, learning_rate=2e-6, beta=0.04, disable_dropout=True,
            gradient_checkpointing=False, use_cpu=True, bf16=False, optim="adamw_torch_fused", seed=0, report_to=[],
            logging_steps=10**6, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": prompts})
        adapters = {} if args.lora is None else {"peft_config": lora(args.lora)}
        run = trainer(
            model, reward, config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()], **adapters
        )
        few = tokenizer(prompts[:8], return_tensors="pt").input_ids
        model.generate(few, do_sample=True, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        reward(prompts[:8], prompts[:8])
        run.train()


def report(peer: str, phase: str, work: Callable[[], object], warm_up: bool = True, scale: float = 1.0) -> None:
    """Time `work` once and print it as a JSON line."""
    if warm_up:
        work()
    start = time.perf_counter()
    work()
    told(peer, phase, scale * (time.perf_counter() - start))


def told(peer: str, phase: str, seconds: float) -> None:
    """Print a timing, and the memory so far, as a JSON line."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peer": peer, "phase": phase, "seconds": seconds, "peak_mb": peak}), flush=True)


def gpt2(layers: int) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_layer=layers))


def lora(rank: int) -> Any:
    """peft's settings of the adapters that we make for `lora={"rank": rank}`."""
    import peft

    layers = ["c_attn", "c_proj", "c_fc"]
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )


def bert(layers: int) -> transformers.BertForSequenceClassification:
    names = {0: "negative", 1: "positive"}
    config = transformers.BertConfig(vocab_size=VOCAB, num_hidden_layers=layers, id2label=names,
                                     label2id={name: i for i, name in names.items()})  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def characters() -> transformers.BertTokenizerFast:
    """A tokenizer of BERT's special tokens, printable ASCII and Chinese characters."""
    vocab = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab += [chr(c) for c in range(33, 127)]
    vocab += [chr(0x4E00 + i) for i in range(VOCAB - len(vocab))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(vocab) + "\n", encoding="utf-8")
        tokenizer = transformers.BertTokenizerFast(str(path))
    tokenizer.eos_token = tokenizer.pad_token
    return tokenizer


if __name__ == "__main__":
    main()
