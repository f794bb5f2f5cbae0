"""What PPO of TRL 0.11.4, the last with `PPOTrainer.step`, learns from the same start; `methods.py` calls this.

    python3 -m venv trl && trl/bin/pip install torch "numpy<2" transformers==4.45.2 accelerate==0.34.2 \\
        datasets==2.21.0 "pyarrow<18" rich trl==0.11.4
    python examples/evidence/methods.py --methods trl --trl-python trl/bin/python

Nothing of ours is imported. The settings are those of our PPO in that comparison, but for what TRL decides: it scores
the full softmax, so it samples with top-p 1, and it whitens by minibatch. A JSON line an iteration, and the policy in
OUTPUT.
"""

import argparse
import json
import os
import random
import time

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
import torch
import transformers

BATCH, NEW_TOKENS = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="GPT-2 folder")
    parser.add_argument("--reward", required=True, help="folder of a classifier or of a reward model")
    parser.add_argument("--output", required=True, help="folder of the trained policy")
    parser.add_argument("--prompts", nargs="+", required=True, help="of equal numbers of tokens")
    parser.add_argument("--kl-coef", type=float, required=True)
    parser.add_argument("--lr", type=float, required=True, help="of the first iteration; it falls to 0")
    parser.add_argument("--epochs", type=int, required=True, help="over each batch")
    parser.add_argument("--minibatch", type=int, required=True)
    parser.add_argument("--cliprange", type=float, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.logging.set_verbosity_error()
    tokenizer, texts_tokenizer = (transformers.BertTokenizer(f"{f}/vocab.txt") for f in (args.policy, args.reward))
    tokenizer.eos_token = tokenizer.pad_token
    policy, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(args.policy) for _ in range(2))
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward).eval()
    labels, scale = classifier.config.id2label, getattr(classifier.config, "reward_normalisation", None)
    positive = [i for i, label in labels.items() if label.startswith("positive")]
    config = PPOConfig(batch_size=BATCH, mini_batch_size=args.minibatch, ppo_epochs=args.epochs, learning_rate=args.lr,
                       init_kl_coef=args.kl_coef, adap_kl_ctrl=False, gamma=1, lam=0.95, cliprange=args.cliprange,
                       cliprange_value=0.2, vf_coef=0.1, max_grad_norm=1.0, seed=args.seed)  # fmt: skip
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / args.iterations)
    trainer = PPOTrainer(config, policy, reference, tokenizer, optimizer=optimizer, lr_scheduler=schedule)
    drawn, wall, cpu = random.Random(args.seed), time.perf_counter(), time.process_time()
    for _ in range(args.iterations):
        prompts = drawn.choices(args.prompts, k=BATCH)
        queries = [torch.tensor(tokenizer.encode(prompt)[:-1]) for prompt in prompts]
        policy.eval()
        with torch.no_grad():
            tokens = policy.generate(
                torch.stack(queries), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True, top_k=0,
                top_p=1.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=None,
            )  # fmt: skip
            responses = [row[len(query) :] for query, row in zip(queries, tokens, strict=True)]
            written = [tokenizer.decode(r, skip_special_tokens=True).replace(" ", "") for r in responses]
            texts = [prompt + text for prompt, text in zip(prompts, written, strict=True)]
            batch = texts_tokenizer(texts, return_tensors="pt", padding=True)
            logits = classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            scores = logits.softmax(-1)[:, positive] if scale is None else (logits - scale["mean"]) / scale["std"]
            scores = scores.squeeze(-1)
        stats = trainer.step(queries, responses, list(scores))
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps({"reward": float(scores.mean()), "kl": float(stats["objective/kl"]), **spent}), flush=True)
    policy.pretrained_model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
