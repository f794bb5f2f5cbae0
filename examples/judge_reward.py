"""PPO with a language model as the judge: any OpenAI-compatible endpoint scores what the small GPT-2 writes.

    python examples/judge_reward.py --base-url http://127.0.0.1:8000/v1 --model NAME      # vLLM, llama.cpp, Ollama
    OPENAI_API_KEY=... python examples/judge_reward.py --base-url https://api.openai.com/v1 --model gpt-4o-mini
    python examples/judge_reward.py --resume runs/NAME    # continue a run that was stopped

Every sample of every batch is one request, so start with few --steps and watch judge/cost. Scores are kept in --cache:
no text is paid for twice.
"""

import argparse
import dataclasses
import random

from minirlhf import PPOConfig, PPOTrainer, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.rewards import ChatJudge, ChatJudgeConfig
from minirlhf.runs.run import Run
from shared import LOGGERS, POLICY, PROMPTS, STARTER, command_line, new_folder, parse, prompt_pool, run_script

# What a good text is. A judge answers more evenly if the rubric says what each number stands for.
RUBRIC = """The text is the beginning of a hotel review in Chinese, cut off after a few words. How content is the guest?
0: angry or disgusted. 3: disappointed. 5: neutral, mixed, or no opinion yet. 7: content. 10: delighted.
A text that is not a sentence of Chinese, or that repeats itself, gets at most 2."""
JUDGE = ("base_url", "model", "rubric", "key_variable", "concurrency", "cache", "prompt_price", "completion_price")


def main() -> None:
    args = read_arguments()
    # 1. The judge. It asks for a number from 0 to 10; its config also has timeout, retries, and the score of a text
    #    whose answers hold no such number. ChatJudge(config, complete) asks a callable of yours instead.
    judge = ChatJudge(ChatJudgeConfig(**{name: getattr(args, name) for name in JUDGE}))

    # 2. The policy, as in positive_reviews.py. score_scale brings 0 to 10 to 0 to 1, the scale of the KL penalty.
    if args.resume:
        run = Run.resume(args.resume)
    else:
        config = PPOConfig(**STARTER, steps=args.steps, batch_size=args.batch_size, gen_len=args.gen_len,
                           entropy_coef=0.01, score_scale=0.1, save_freq=1, seed=args.seed)  # fmt: skip
        policy, tokenizer = load_decoder(args.policy), Tokenizer.from_pretrained(args.policy)
        trainer = PPOTrainer(policy, args.policy, tokenizer, config)
        trainer.check_prompts(args.prompts)
        settings = {"arguments": vars(args), "ppo": dataclasses.asdict(config)}  # the key is not in there
        run = Run.start(args.output, trainer, settings, loggers=args.loggers)

    # 3. The loop. A judge is a reward like any other: a callable from texts to numbers.
    with run:
        trainer, config, spent = run.trainer, run.trainer.config, 0.0
        pool = trainer.check_prompts(args.prompts)
        for iteration in range(trainer.iteration, config.iterations):
            prompts = random.Random(f"{config.seed} {iteration}").choices(pool, k=config.batch_size)
            rollout = trainer.collect(prompts, judge)
            stats = trainer.step(rollout)

            # 4. What the judge did and cost is among the statistics of PPO, in the same line of metrics.jsonl.
            spent += stats["judge/cost"]
            samples = run.record(rollout, stats)
            show(
                f"step {iteration + 1}: score {stats['reward/mean']:.2f}, KL {stats['objective/kl']:.1f}, "
                f"{stats['judge/requests']:.0f} requests, {stats['judge/unparsed']:.0f} texts without a score, "
                f"spent {spent:.4f}"
            )
            # 5. Read them: a policy that has found words which fool the judge has a fine reward too.
            for text, score in samples:
                show(f"    {score:4.1f}  {text}")
        trainer.save_pretrained(run.folder / "policy")
    show(f"saved in {run.folder}")


def read_arguments() -> argparse.Namespace:
    parser = command_line(
        __doc__,
        base_url=(str, "requests go to BASE_URL/chat/completions"),
        model=(str, "the judge's name at the endpoint"),
        rubric=(RUBRIC, "what the judge is told"),
        key_variable=("OPENAI_API_KEY", "environment variable that holds the key"),
        concurrency=(8, "requests at a time"),
        cache=("runs/judge_cache.jsonl", "file of scores that were paid for"),
        prompt_price=(0.0, "of a million tokens, in any currency"),
        completion_price=(0.0, "of a million tokens"),
        policy=(POLICY, "GPT-2 folder"),
        prompts=(PROMPTS, "texts to continue, or one file, .txt or .jsonl"),
        steps=(1280, "samples in all: as many requests, at most"),
        batch_size=(64, "samples of a PPO step"),
        gen_len=(16, "tokens of a sample"),
        seed=(0, "of everything"),
        output=(new_folder("judge-"), "folder of the run"),
        loggers=LOGGERS,
        resume=(str, "continue the run in this folder, with its own settings"),
    )
    args = parse(parser)
    if args.base_url is None or args.model is None:
        parser.error("--base-url and --model are needed, or --resume")
    if not args.resume:
        args.prompts = prompt_pool(args.prompts, args.policy)
    return args


if __name__ == "__main__":
    run_script(main)
