"""Commands on a run: doctor before it, evaluate after it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

from minirlhf.commands.models import trained_model
from minirlhf.commands.table import AS_JSON, DEVICE, EOS, REWARD, SEED, argument, command, integer
from minirlhf.common.printing import show
from minirlhf.common.text import json_line
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import PRECISION_SETTINGS
from minirlhf.evaluation import evaluate as evaluation
from minirlhf.evaluation.doctor import doctor as examination
from minirlhf.evaluation.doctor.setup import FAIL
from minirlhf.evaluation.evaluate import MAX_N, EvaluationConfig
from minirlhf.evaluation.optimum import price_of_kl
from minirlhf.evaluation.report import report
from minirlhf.evaluation.report_texts import LANGUAGES
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io.files import atomic_write, read_json, read_jsonl, write_json
from minirlhf.io.training_state import module_hash
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.scorers import load_scorer
from minirlhf.runs.log import CONFIG_FILE, METRICS_FILE, SAMPLES_FILE
from minirlhf.text.language import warn_of_language
from minirlhf.text.prompts import as_prompts, read_pool
from minirlhf.text.tokenizer import Tokenizer

EVALUATION_FILE, REPORT_FILE = "evaluation.json", "report.html"
# How both models are sampled without a run.
SAMPLING: dict[str, Any] = dict(gen_len=16, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None)


@command(
    argument("--policy", required=True, metavar="FOLDER", help="GPT-2 folder with its tokenizer"),
    REWARD,
    argument("--positive-label", metavar="NAME", help="of the classifier; default: as its labels say"),
    argument("--reference", metavar="FOLDER", help="GPT-2 folder; default: the policy's"),
    argument("--prompts", nargs="+", metavar="TEXT", help="the pool of prompts; default: words of the vocabulary"),
    argument("--canaries", nargs=2, metavar=("GOOD", "BAD"), help="two texts that the reward must order"),
    argument("--precision", choices=PRECISION_SETTINGS, help="PPOConfig.precision"),
    argument("--batch-size", type=int, help="PPOConfig.batch_size"),
    argument("--gen-len", type=int, help="PPOConfig.gen_len"),
    argument("--init-kl-coef", type=float, help="PPOConfig.init_kl_coef, for the forecast"),
    argument("--target", type=float, help="PPOConfig.target, for the forecast"),
    argument("--top-p", type=float, help="PPOConfig.top_p"),
    DEVICE,
)
def doctor(args: argparse.Namespace) -> int:
    """Examine a PPO run before it starts; the exit code is 1 if a check failed."""
    names = ("precision", "batch_size", "gen_len", "init_kl_coef", "target", "top_p", "device")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    warn_of_language(args.prompts or [], args.policy, args.reward)
    findings = examination.doctor(
        args.policy, args.reference, reward=args.reward, prompts=args.prompts, positive_label=args.positive_label,
        canaries=args.canaries, **given,
    )  # fmt: skip
    return int(any(finding.status == FAIL for finding in findings))


@command(
    argument("--run", metavar="FOLDER", help="of a run: its policy/, reference/, prompts, sampling and curves"),
    argument("--policy", metavar="FOLDER", help="GPT-2 folder with its tokenizer; default: the run's"),
    argument("--reference", metavar="FOLDER", help="GPT-2 folder; default: the run's"),
    REWARD,
    argument("--second-scorer", metavar="FOLDER", help="another one, on which the policy was not trained"),
    argument("--prompts", nargs="+", metavar="TEXT", help="of the training, or one file with a text a line"),
    argument("--held-out-prompts", nargs="+", metavar="TEXT", help="not of the training; in the same form"),
    argument("--encoding", default="utf-8", help="of such files; default %(default)s"),
    argument("--samples", type=integer(2), default=512, metavar="N", help="of each model; default %(default)s"),
    argument("--best-of", nargs="+", type=integer(1, MAX_N), default=[2, 4, 8, 16], metavar="N", help="2 4 8 16"),
    argument("--gen-len", type=integer(1), metavar="N", help="tokens of each; default: as the run, or 16"),
    argument("--top-p", type=float, metavar="P", help="nucleus; default: as the run, or 1: all"),
    argument("--top-k", type=integer(0), metavar="K", help="most probable tokens; default: as the run, or 0: all"),
    argument("--temperature", type=float, metavar="T", help="divides the logits; default: as the run, or 1"),
    SEED,
    EOS,
    argument("--output", metavar="FOLDER", help=f"leave {EVALUATION_FILE} and {REPORT_FILE} there"),
    argument("--language", choices=LANGUAGES, default="en", help=f"of {REPORT_FILE}; default %(default)s"),
    DEVICE,
    AS_JSON,
)
def evaluate(args: argparse.Namespace) -> None:
    """Compare a policy with its reference, and look for reward hacking."""
    where, output = resolve_device(args.device), None if args.output is None else _free(Path(args.output))
    started, history, samples = {}, [], []
    if args.run is not None:
        run = Path(args.run)
        started, history = read_json(run / CONFIG_FILE), read_jsonl(run / METRICS_FILE)
        samples = read_jsonl(run / SAMPLES_FILE) if (run / SAMPLES_FILE).is_file() else []
        args.policy = args.policy or str(run / "policy" if (run / "policy").is_dir() else trained_model(args.run))
        args.reference = args.reference or str(run / "reference")
    if args.policy is None or args.reference is None:
        raise ValueError("give --run, or --policy and --reference")
    ppo, arguments = (x if isinstance(x := started.get(key), dict) else {} for key in ("ppo", "arguments"))
    prompts = args.prompts or arguments.get("prompts")
    if not (isinstance(prompts, list) and prompts and all(isinstance(prompt, (str, list)) for prompt in prompts)):
        raise ValueError("give --prompts, or a --run whose config.json has them under arguments")
    are_texts = not args.prompts and len(prompts) > 1  # a run has kept the texts, also where they look like files
    pools = [prompts if are_texts else read_pool(prompts, args.encoding)]
    if args.held_out_prompts is not None:
        pools.append(read_pool(args.held_out_prompts, args.encoding))
    drawn = {name: ppo.get(name, default) for name, default in SAMPLING.items()}
    drawn |= {name: value for name in SAMPLING if (value := getattr(args, name, None)) is not None}
    sampling = SamplingConfig(drawn["temperature"], drawn["top_k"], drawn["top_p"])  # before anything is loaded

    tokenizer = Tokenizer.from_pretrained(args.policy)
    prompts, *held_out = [as_prompts(pool, tokenizer) for pool in pools]
    texts = [prompt for pool in (prompts, *held_out) for prompt in pool]
    warn_of_language(texts, args.policy, args.reward, args.second_scorer)
    if args.eos:
        ends = tokenizer.eos_token_id
        drawn["eos_token_id"] = ends if isinstance(ends, int) else list(ends)  # as in a run's JSON
    trained = bool(history) and isinstance(history[-1].get("objective/kl_coef"), float)
    config = EvaluationConfig(
        args.samples, drawn["gen_len"], sampling, drawn["eos_token_id"], tuple(args.best_of), seed=args.seed,
        kl_coef=price_of_kl(history[-1]["objective/kl_coef"], ppo) if trained else None,
    )  # fmt: skip
    policy, reference = (load_decoder(folder).to(where) for folder in (args.policy, args.reference))
    own = None if args.run is None else Path(args.run) / "reference"
    given_another = own is not None and own.is_dir() and not own.samefile(args.reference)
    if given_another and module_hash(load_decoder(str(own))) != module_hash(reference):
        warnings.warn(f"{args.reference} is another reference than {own}, from which the run began", stacklevel=2)
    reward = load_scorer(args.reward, args.device)
    second = None if args.second_scorer is None else load_scorer(args.second_scorer, args.device)
    if sys.stderr.isatty():
        scored = len(pools) * (2 * args.samples + config.best_of_prompts * max(config.best_of))
        show(f"sampling and scoring at least {scored:,} texts ...", sys.stderr)
    held_out_prompts = held_out[0] if held_out else None
    found = evaluation.evaluate(policy, reference, tokenizer, prompts, reward, held_out_prompts, second, config)
    about = {"policy": args.policy, "reference": args.reference, "reward": args.reward,
             "second scorer": args.second_scorer}  # fmt: skip
    if output is not None:
        title = f"Evaluation of {Path(args.run or args.policy).resolve().name}"
        target = ppo.get("target") if ppo.get("adaptive_kl") else None
        page = report(found, title, about, history, target, samples, args.language)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / EVALUATION_FILE, {**about, **found.as_dict()})
        atomic_write(output / REPORT_FILE, page.encode("utf-8"))
    if args.as_json:
        show(json_line({**about, **found.as_dict()}))
        return
    line = f"sampled with {', '.join(f'{name} {value}' for name, value in drawn.items())}"
    if args.run is not None:
        other = [f"{name} {ppo.get(name, 'unknown')}" for name in SAMPLING if ppo.get(name, "unknown") != drawn[name]]
        line += f"; unlike the run, which had {', '.join(other)}" if other else "; as the run was"
    show("\n".join([line, *found.lines()]))


def _free(output: Path) -> Path:
    """The output folder. Raises before any work if it cannot be one, or holds another evaluation already."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the report needs matplotlib: pip install matplotlib (minirlhf's extra examples)")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, not a folder")
    for name in (EVALUATION_FILE, REPORT_FILE):
        if (output / name).exists():
            raise FileExistsError(f"{output / name} exists; choose another --output")
    return output
