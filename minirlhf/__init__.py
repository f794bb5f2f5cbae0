"""PPO-RLHF for language models in plain PyTorch: GPT-2, sampling, rewards and PPO from scratch."""

from minirlhf import ppo
from minirlhf.generation import Generation, generate
from minirlhf.models.bert import BertClassifier, BertConfig
from minirlhf.models.gpt2 import GPT2, GPT2Config
from minirlhf.models.heads import ActorCritic, ValueHead
from minirlhf.ppo import AdaptiveKL, FixedKL
from minirlhf.ppo_config import PPOConfig
from minirlhf.rewards import SentimentReward
from minirlhf.rollout import Rollout, collect_rollout
from minirlhf.sampling import SamplingConfig, sample_top_p
from minirlhf.tokenizer import Tokenizer
from minirlhf.trainer import PPOTrainer

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "ActorCritic",
    "AdaptiveKL",
    "BertClassifier",
    "BertConfig",
    "FixedKL",
    "GPT2Config",
    "Generation",
    "PPOConfig",
    "PPOTrainer",
    "Rollout",
    "SamplingConfig",
    "SentimentReward",
    "Tokenizer",
    "ValueHead",
    "collect_rollout",
    "generate",
    "ppo",
    "sample_top_p",
]
