"""Unpicked samples of a language model for each prompt, with their P(positive), as Markdown.

python weights/train/starter_samples.py [--policy FOLDER --reward FOLDER --count 20 --seed 0]
"""

import argparse
from pathlib import Path

import torch

from minirlhf import GPT2, SamplingConfig, SentimentReward, Tokenizer, generate
from minirlhf.common.text import printable

WEIGHTS = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"))
    parser.add_argument("--reward", default=str(WEIGHTS / "bert-chinese-reviews-sentiment-small"))
    parser.add_argument("--prompts", nargs="+", default=["酒店", "周围", "位置", "前台"])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = GPT2.from_pretrained(args.policy), Tokenizer.from_pretrained(args.policy)
    reward = SentimentReward.from_pretrained(args.reward, device="cpu")
    generator = torch.Generator().manual_seed(args.seed)
    means = []
    for prompt in args.prompts:
        ids = [tokenizer.encode_prompt(prompt)] * args.count
        sampled = generate(model, ids, args.gen_len, SamplingConfig(top_p=0.95), generator=generator)
        texts = [prompt + tokenizer.decode(response) for response in sampled.responses]
        scores = reward(texts)
        means.append(scores.mean().item())
        shown = "; ".join(f"{printable(text)} ({score:.2f})" for text, score in zip(texts, scores, strict=True))
        print(f"**{prompt}**, mean {means[-1]:.2f}: {shown}\n")
    print(f"Mean over all {args.count * len(args.prompts)}: {sum(means) / len(means):.3f}")


if __name__ == "__main__":
    main()
