"""What the HTML report says, in English and in Chinese; the Chinese is found by the English text."""

from __future__ import annotations

import re

LANGUAGES = ("en", "zh")

# Each figure of the tables and each picture, in a sentence. A name ends where a figure's name begins to vary.
EXPLAINED = (
    ("reward gained", "mean reward of the policy less that of the reference", "策略的平均奖励减去参考模型的平均奖励"),
    ("reward", "mean reward of the samples, with its bootstrap interval", "样本的平均奖励，方括号内是自助法区间"),
    (
        "second scorer gained",
        "the same gain by a scorer that the policy was not trained on",
        "策略没有用它训练的另一个裁判看到的提升",
    ),
    (
        "second scorer",
        "mean score by a scorer that the policy was not trained on",
        "策略没有用它训练的另一个裁判的平均分",
    ),
    (
        "KL exact that the optimum needs",
        "the least KL with which any policy can have this reward",
        "任何策略要得到这个奖励至少需要的 KL",
    ),
    (
        "KL exact",
        "KL(policy || reference) a sequence, at each token over all that could have been sampled",
        "每个序列的 KL（策略 || 参考模型），逐个词元对所有可能被采样的词元求和",
    ),
    (
        "KL sampled",
        "the log-ratio of the sampled tokens, the same in expectation",
        "采样到的词元的对数比，期望与上一行相同",
    ),
    ("KL full softmax", "the exact KL with nothing truncated, at temperature 1", "不截断、温度为 1 时的精确 KL"),
    (
        "efficiency",
        "KL needed over KL spent; 1 is the best that any policy can do",
        "所需 KL 与所花 KL 之比，1 是任何策略的上限",
    ),
    (
        "perplexity",
        "how unlikely the reference finds a token: exp of the mean negative log-likelihood",
        "参考模型认为每个词元有多意外：平均负对数似然的指数",
    ),
    (
        "distinct-",
        "distinct n-grams over all n-grams of all samples: lower is less varied",
        "所有样本中不同 n 元组所占的比例，越低越单一",
    ),
    (
        "self-BLEU",
        "mean BLEU-4 of a sample against all others; 1: they are all alike",
        "每个样本对其余样本的平均 BLEU-4，1 表示完全雷同",
    ),
    ("characters a response", "mean length of a response in characters", "回答的平均字符数"),
    ("tokens a response", "mean length of a response in tokens", "回答的平均词元数"),
    ("share of repeated", "units of a response that occurred in it before", "回答中重复出现过的单位所占的比例"),
    (
        "best of",
        "the best by reward of n samples of the reference; its KL is at most log n - (n - 1) / n",
        "参考模型 n 个样本中奖励最高的一个，其 KL 至多为 log n - (n - 1) / n",
    ),
    ("policy", "one sample of the policy, which needs no choice among n", "策略的一个样本，不需要从 n 个里挑选"),
    (
        "picture over KL",
        "The higher and the further left, the better: no policy is above the green line, the optimum; "
        "grey is best-of-n of the reference, blue the policy, each with its interval.",
        "越高越靠左越好：没有策略能高于绿线（最优）；灰色是参考模型的 best-of-n，蓝色是策略，均带区间。",
    ),
    (
        "picture of the run",
        "The reward of each batch and the KL that it cost, then how varied the samples still are (entropy) "
        "and whether the value head follows (value loss); without a value head, the norm of the gradient.",
        "每一批的奖励及其所花的 KL，样本还有多少变化（熵），以及价值头是否跟得上（价值损失；没有价值头时是梯度范数）。",
    ),
)

CHINESE = {
    "Samples on the given prompts": "给定提示词的样本",
    "Samples on the held-out prompts": "未训练提示词的样本",
    "The first ones, unpicked; left before, right after.": "最前面的样本，未经挑选；左为训练前，右为训练后。",
    "More": "更多",
    "Findings": "发现",
    "On the given prompts": "给定的提示词",
    "On the held-out prompts": "未训练的提示词",
    "Figures": "数字",
    "Best-of-n of the reference, and the optimum": "参考模型的 best-of-n 与最优",
    "The run": "训练过程",
    "Settings": "设置",
    "the given prompts": "给定的提示词",
    "the held-out prompts": "未训练的提示词",
    "No symptom of reward hacking was found.": "没有发现钻奖励空子的迹象。",
    "before": "训练前",
    "after": "训练后",
    "reference": "参考模型",
    "policy": "策略",
    "KL": "KL",
    "reward": "奖励",
    "second scorer": "第二个裁判",
    "reward over KL: policy, best-of-n and optimum": "奖励与 KL：策略、best-of-n 与最优",
    "second scorer over KL: policy, best-of-n and optimum": "第二个裁判与 KL：策略、best-of-n 与最优",
    "curves of the run": "训练曲线",
}

# Sentences of `findings`, with figures in them.
SENTENCES = (
    (r"the reward rose by (.*), the second scorer did not: (.*)", r"奖励提升了 \1，第二个裁判却没有：\2"),
    (
        r"the second scorer rose by (.*), less than (.*) of the (.*) that best-of-n brings it at equal KL",
        r"第二个裁判提升了 \1，不到相同 KL 下 best-of-n 所带来的 \3 的 \2",
    ),
    (
        r"the reward rose by (.*) on the given prompts, and by (.*) on held-out ones(?:: (.*) and (.*) of what .*)?",
        r"奖励在给定提示词上提升了 \1，在未训练提示词上提升了 \2",
    ),
    (r"the samples lost variety: distinct-2 fell from (.*) to (.*)", r"样本变得单一：distinct-2 从 \1 降到 \2"),
    (r"the samples are alike: self-BLEU rose from (.*) to (.*)", r"样本彼此雷同：self-BLEU 从 \1 升到 \2"),
    (r"the samples repeat themselves: (.*) to (.*) of their .*", r"样本自我重复：重复的比例从 \1 升到 \2"),
    (
        r"the reference finds the samples unlikely: perplexity (.*) to (.*)",
        r"参考模型认为样本不自然：困惑度从 \1 到 \2",
    ),
    (r"the length changed from (.*) to (.*) characters a response", r"长度变了：每个回答从 \1 个字符到 \2 个"),
    (
        r"the policy's KL of (.*) is beyond what best-of-n was drawn for",
        r"策略的 KL \1 超出了所采样的 best-of-n 的范围",
    ),
    (r"policy less best-of-n at equal KL: (.*)", r"相同 KL 下，策略减去 best-of-n：\1"),
    (
        r"in use: one sample of the policy is worth the best of (.*) of the reference, .*",
        r"使用时：策略的一个样本抵得上参考模型 \1 个样本中最好的一个，后者每次回答都要采样并打分这么多次",
    ),
    (
        r"in use: one sample of the policy has more reward than the best of (.*) of the reference",
        r"使用时：策略的一个样本的奖励高于参考模型 \1 个样本中最好的一个",
    ),
    (
        r"in use: a sample of the policy has no more reward than one of the reference, .*",
        r"使用时：就能看出的而言，策略的一个样本的奖励并不高于参考模型的一个样本",
    ),
    (r"optimum: (.*)", r"最优：\1"),
)


class Texts:
    """The texts of one language.

    Raises ValueError for a language that is not among LANGUAGES.
    """

    def __init__(self, language: str):
        if language not in LANGUAGES:
            raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
        self.language = language

    def say(self, text: str) -> str:
        """A fixed text of the report."""
        return text if self.language == "en" else CHINESE[text]

    def sentence(self, text: str) -> str:
        """A sentence of `findings`, as it is if it is not among SENTENCES."""
        if self.language == "zh":
            if (inner := text.removeprefix("on held-out prompts ")) != text:
                return f"在未训练提示词上，{self.sentence(inner)}"
            for pattern, chinese in SENTENCES:
                if found := re.fullmatch(pattern, text, re.DOTALL):
                    return found.expand(chinese)
        return text

    def explained(self, name: str) -> str:
        """What a figure or a picture means."""
        found = [(english, chinese) for begin, english, chinese in EXPLAINED if name.startswith(begin)]
        return found[0][self.language == "zh"]
