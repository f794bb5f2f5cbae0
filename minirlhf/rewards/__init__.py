"""Everything that scores a text: classifiers, reward models, judges, people, and rewards made of rewards.

Training of classifiers and reward models is in `supervised`. In reading order: `base` (what a reward is), `sentiment`
with `labels`, `reward_model`, `ngrams`, `composed`, `judge` with `judge_answer`, `judge_endpoint` and `score_cache`,
`human` with `human_page`; `scorers` loads any of the first kinds from a folder.
"""

from minirlhf.rewards.judge import ChatJudge, ChatJudgeConfig

__all__ = ["ChatJudge", "ChatJudgeConfig"]
