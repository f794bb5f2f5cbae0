"""PPO-RLHF for language models in plain PyTorch: GPT-2, sampling, rewards and PPO from scratch."""

from minirlhf import ppo
from minirlhf.best_of import BestOfN, best_of_n
from minirlhf.diagnosis.doctor import Finding, doctor
from minirlhf.evaluation import EvaluationConfig, evaluate
from minirlhf.generation import Generation, generate
from minirlhf.graphed_decode import GraphedDecoder
from minirlhf.models.bert import BertClassifier, BertConfig
from minirlhf.models.gpt2 import GPT2, GPT2Config
from minirlhf.models.heads import ActorCritic, ValueHead
from minirlhf.models.reward import RewardModel
from minirlhf.ngram_scorer import NGramScorer
from minirlhf.ppo import AdaptiveKL, FixedKL
from minirlhf.ppo_config import PPOConfig
from minirlhf.rewards import SentimentReward
from minirlhf.rollout import Rollout, collect_rollout
from minirlhf.sampling import SamplingConfig, sample_top_p
from minirlhf.tokenizer import Tokenizer
from minirlhf.trainer import PPOTrainer
from minirlhf.version import __version__ as __version__

__all__ = [
    "GPT2",
    "ActorCritic",
    "AdaptiveKL",
    "BertClassifier",
    "BertConfig",
    "BestOfN",
    "EvaluationConfig",
    "Finding",
    "FixedKL",
    "GPT2Config",
    "Generation",
    "GraphedDecoder",
    "NGramScorer",
    "PPOConfig",
    "PPOTrainer",
    "RewardModel",
    "Rollout",
    "SamplingConfig",
    "SentimentReward",
    "Tokenizer",
    "ValueHead",
    "best_of_n",
    "collect_rollout",
    "doctor",
    "evaluate",
    "generate",
    "ppo",
    "sample_top_p",
]
