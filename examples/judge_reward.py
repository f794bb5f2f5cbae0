"""PPO with a language model as the judge: any OpenAI-compatible endpoint scores what the small GPT-2 writes.

    python examples/judge_reward.py --base-url http://127.0.0.1:8000/v1 --model NAME      # vLLM, llama.cpp, Ollama
    OPENAI_API_KEY=... python examples/judge_reward.py --base-url https://api.openai.com/v1 --model gpt-4o-mini

Every sample of every batch is one request, so start with few --steps and watch judge/cost. Scores are kept in --cache:
a run that is stopped and started again with the same seed pays for new texts only.
"""

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path

from minirlhf import GPT2, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.common.text import printable
from minirlhf.rewards.judge import ChatJudge, ChatJudgeConfig
from minirlhf.runs.log import RunLog

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk
# What a good text is. A rubric that says what each number stands for is answered more evenly than a wish.
RUBRIC = """The text is the beginning of a hotel review in Chinese, cut off after a few words. How content is the guest?
0: angry or disgusted. 3: disappointed. 5: neutral, mixed, or no opinion yet. 7: content. 10: delighted.
A text that is not a sentence of Chinese, or that repeats itself, gets at most 2."""


def main() -> None:
    args = read_arguments()

    # 1. The judge. It asks for a number from 0 to 10. Timeouts, retries, and the score of texts whose answers hold no
    #    such number are fields of the config. ChatJudge(config, complete) asks a callable of yours instead.
    judge = ChatJudge(
        ChatJudgeConfig(
            base_url=args.base_url,
            model=args.model,
            rubric=args.rubric,
            key_variable=args.key_variable,
            concurrency=args.concurrency,
            cache=args.cache,
            prompt_price=args.prompt_price,
            completion_price=args.completion_price,
        )
    )

    # 2. The policy, as in positive_reviews.py. score_scale brings 0 to 10 to 0 to 1, the scale of the KL penalty.
    config = PPOConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        gen_len=args.gen_len,
        lr=2e-4,
        minibatch_size=32,
        forward_batch_size=32,
        entropy_coef=0.01,
        score_scale=0.1,
        seed=args.seed,
    )
    tokenizer = Tokenizer.from_pretrained(args.policy)
    policy, reference = GPT2.from_pretrained(args.policy), GPT2.from_pretrained(args.policy)
    trainer = PPOTrainer(policy, reference, tokenizer, config)
    output = Path(args.output or f"runs/judge-{time.strftime('%Y%m%d-%H%M%S')}")
    log = RunLog(output, {"arguments": vars(args), "ppo": dataclasses.asdict(config)})  # the key is not in there

    # 3. The loop. A judge is a reward like any other: a callable from texts to numbers.
    spent = 0.0
    for iteration in range(config.iterations):
        prompts = random.Random(f"{config.seed} {iteration}").choices(PROMPTS, k=config.batch_size)
        rollout = trainer.collect(prompts, judge)
        stats = trainer.step(rollout)

        # 4. What the judge did and cost goes into the same line of metrics.jsonl as the statistics of PPO.
        judged = judge.metrics()
        spent += judged["judge/cost"]
        log.metrics(iteration + 1, {**stats, **judged})
        texts, scores = rollout.texts[:4], rollout.scores[:4].tolist()
        log.samples(iteration + 1, texts, scores)
        print(
            f"step {iteration + 1}: score {stats['reward/mean']:.2f}, KL {stats['objective/kl']:.1f}, "
            f"{judged['judge/requests']:.0f} requests, {judged['judge/unparsed']:.0f} texts without a score, "
            f"spent {spent:.4f}"
        )
        # 5. Read them: a policy that has found words which fool the judge has a fine reward too.
        for text, score in zip(texts, scores, strict=True):
            print(f"    {score:4.1f}  {printable(text)}")
    trainer.policy.save_pretrained(output / "policy")
    tokenizer.save_pretrained(output / "policy")
    print(f"saved in {output}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="requests go to BASE_URL/chat/completions")
    parser.add_argument("--model", required=True, help="the judge's name at the endpoint")
    parser.add_argument("--rubric", default=RUBRIC)
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument("--cache", default="runs/judge_cache.jsonl", help="file of scores that were paid for")
    parser.add_argument("--prompt-price", type=float, default=0.0, help="of a million tokens, in any currency")
    parser.add_argument("--completion-price", type=float, default=0.0)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"), help="GPT-2 folder")
    parser.add_argument("--steps", type=int, default=1280, help="samples in all: as many requests, at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder of the run, default runs/judge-<time>")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input, or a judge that cannot be asked: one line, no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the scores so far are in the cache")
