"""PPO-RLHF for language models in plain PyTorch: GPT-2, sampling, rewards and PPO from scratch."""

from minirlhf.evaluation.best_of import BestOfN, best_of_n
from minirlhf.evaluation.doctor.doctor import Finding, doctor
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.explanation import explain
from minirlhf.evaluation.optimum import Optimum, optimum
from minirlhf.generation.generate import Generation, generate
from minirlhf.generation.sampling import SamplingConfig, sample_top_p
from minirlhf.io.starter import Starter, starter
from minirlhf.models.bert import BertClassifier, BertConfig
from minirlhf.models.decoder import Decoder
from minirlhf.models.gpt2 import GPT2, GPT2Config
from minirlhf.models.heads import ActorCritic, ValueHead
from minirlhf.models.llama import Llama, LlamaConfig
from minirlhf.models.loading import load_decoder
from minirlhf.models.prepared import Models
from minirlhf.models.static_decode import GraphedDecoder
from minirlhf.rewards.ngrams import NGramScorer
from minirlhf.rewards.reward_model import RewardModel
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.kl import AdaptiveKL, FixedKL
from minirlhf.rl.rollout import Rollout, collect_rollout
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.runs.run import Run
from minirlhf.supervised.dpo import DPOTrainer
from minirlhf.supervised.dpo_config import DPOConfig
from minirlhf.text.tokenizer import Tokenizer
from minirlhf.version import __version__ as __version__

__all__ = [
    "GPT2",
    "ActorCritic",
    "AdaptiveKL",
    "BertClassifier",
    "BertConfig",
    "BestOfN",
    "DPOConfig",
    "DPOTrainer",
    "Decoder",
    "EvaluationConfig",
    "Finding",
    "FixedKL",
    "GPT2Config",
    "Generation",
    "GraphedDecoder",
    "Llama",
    "LlamaConfig",
    "Models",
    "NGramScorer",
    "Optimum",
    "PPOConfig",
    "PPOTrainer",
    "RewardModel",
    "Rollout",
    "Run",
    "SamplingConfig",
    "SentimentReward",
    "Starter",
    "Tokenizer",
    "ValueHead",
    "best_of_n",
    "collect_rollout",
    "doctor",
    "evaluate",
    "explain",
    "generate",
    "load_decoder",
    "optimum",
    "sample_top_p",
    "starter",
]
