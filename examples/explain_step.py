"""One PPO step on real samples, token by token: what each token was worth, and what the step did about it.

python examples/explain_step.py [--policy FOLDER --reward FOLDER --prompt 酒店 --seed 0]
"""

from minirlhf import PPOTrainer, SentimentReward, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.evaluation.explanation import explain
from minirlhf.text.language import warn_of_language
from shared import POLICY, REWARD, command_line, run_script


def main() -> None:
    args = command_line(
        __doc__,
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "BERT folder"),
        prompt=("酒店", "text to continue"),
        batch_size=(64, "samples of the step"),
        lr=(3e-4, "PPOConfig.lr"),
        seed=(0, "of everything"),
        picture=(str, "draw the best sample's tokens into this PNG"),
    ).parse_args()
    warn_of_language([args.prompt], args.policy, args.reward)
    policy, tokenizer = load_decoder(args.policy), Tokenizer.from_pretrained(args.policy)
    reward, n = SentimentReward.from_pretrained(args.reward), args.batch_size
    trainer = PPOTrainer(policy, args.policy, tokenizer, lr=args.lr, seed=args.seed, batch_size=n, steps=2 * n)
    # After the first step the policy has left the reference, so that the second has a KL to show.
    trainer.step(trainer.collect([args.prompt] * n, reward))
    rollout = trainer.collect([args.prompt] * n, reward)
    show(f"mean score of the batch {rollout.scores.mean():.4f}, KL coefficient {trainer.kl_controller.coef:.4f}")
    trainer.step(rollout)
    show()
    best = explain(trainer, rollout, int(rollout.scores.argmax()))
    show()
    explain(trainer, rollout, int(rollout.scores.argmin()))
    if args.picture is not None:
        best.draw(args.picture)


if __name__ == "__main__":
    run_script(main)
