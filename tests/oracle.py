"""A second PPO, for tests only: float64 numpy and explicit loops, written from the papers, without torch.

Sources: Schulman et al. 2016 (GAE), 2017 (PPO), 2020 (KL estimators); Ziegler et al. 2019 (rewards, KL controller);
Stiennon et al. 2020; Radford et al. 2019 (GPT-2); Touvron et al. 2023, Yang et al. 2025 (Llama, Qwen3); Loshchilov &
Hutter 2019 (AdamW); Pascanu et al. 2013 (clipping);
Williams 1992, Kool et al. 2019, Shao et al. 2024, Liu et al. 2025, Yu et al. 2025, Zheng et al. 2025, Hu 2025 (groups).
Gradients come from the complex step (Squire & Trapp 1998): f'(x) = Im f(x + ih) / h, exact to rounding.
"""

import math

import numpy as np

# ---- masked statistics ----------------------------------------------------------------------------------------------


def entries(x, mask):
    """The unmasked entries, row by row."""
    return [float(x[b][t]) for b in range(len(mask)) for t in range(len(mask[b])) if mask[b][t]]


def mean(xs):
    return sum(xs) / len(xs) if xs else 0.0


def variance(xs, ddof=1):
    m = mean(xs)
    return sum((x - m) ** 2 for x in xs) / max(len(xs) - ddof, 1)


def whiten_rows(rows, shift_mean=True, ddof=1, eps=1e-8):
    """Rows of any lengths, whitened over all their entries."""
    xs = [x for row in rows for x in row]
    if len(xs) < 2:
        return rows
    m, scale = mean(xs), math.sqrt(variance(xs, ddof) + eps)
    return [[(x - m) / scale + (0.0 if shift_mean else m) for x in row] for row in rows]


def whiten(x, mask, shift_mean=True, ddof=1):
    """The same of rectangular rows with a mask; 0 at padding."""
    ragged = [[float(v) for v, kept in zip(*pair, strict=True) if kept] for pair in zip(x, mask, strict=True)]
    out = np.zeros(np.shape(mask))
    for b, row in enumerate(whiten_rows(ragged, shift_mean, ddof)):
        out[b, [t for t in range(len(mask[b])) if mask[b][t]]] = row
    return out


def explained_variance(values, returns, mask):
    r, v = entries(returns, mask), entries(values, mask)
    total = variance(r)
    return 1.0 - variance([a - b for a, b in zip(r, v, strict=True)]) / total if total > 0 else 0.0


# ---- distributions --------------------------------------------------------------------------------------------------


def log_softmax(logits):
    """Of one distribution; a logit of -inf has probability 0."""
    top = max(logits)
    total = math.log(sum(math.exp(z - top) for z in logits))
    return [z - top - total for z in logits]


def entropy(logits):
    return -sum(math.exp(lp) * lp for lp in log_softmax(logits) if lp > -math.inf)


def exact_kl(logits, ref_logits):
    pairs = zip(log_softmax(logits), log_softmax(ref_logits), strict=True)
    return sum(math.exp(p) * (p - q) for p, q in pairs if p > -math.inf)


def k1(logp, ref):
    """-log r with r = q / p (Schulman 2020)."""
    return -(ref - logp)


def k2(logp, ref):
    """(log r)^2 / 2."""
    return (ref - logp) ** 2 / 2


def k3(logp, ref):
    """(r - 1) - log r."""
    return (math.exp(ref - logp) - 1) - (ref - logp)


# ---- rewards, advantages, losses ------------------------------------------------------------------------------------


def token_rewards(scores, kl, coef, mask, token_scores=None):
    """token_scores: what single tokens get; the last one gets the rest of the score as well."""
    out = np.zeros(np.shape(mask))
    for b in range(len(mask)):
        real = [t for t in range(len(mask[b])) if mask[b][t]]
        for t in real:
            out[b, t] = -coef * float(kl[b][t])
        if real:
            out[b, real[-1]] += float(scores[b])
        if token_scores is not None:
            for t in real:
                out[b, t] += float(token_scores[b][t])
                out[b, real[-1]] -= float(token_scores[b][t])
    return out


def gae_row(rewards, values, gamma, lam):
    """Eq. 16 of Schulman et al. 2016 as the sum it is: A_t = sum_l (gamma lam)^l delta_{t+l}; and A_t + V_t."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def gae(rewards, values, mask, gamma, lam):
    advantages, returns = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))
    for b in range(len(mask)):
        real = [t for t in range(len(mask[b])) if mask[b][t]]
        row = gae_row([float(rewards[b][t]) for t in real], [float(values[b][t]) for t in real], gamma, lam)
        for t, a, r in zip(real, *row, strict=True):
            advantages[b, t], returns[b, t] = a, r
    return advantages, returns


def reinforce(rewards, gamma):
    """The discounted return to go of each token (Williams 1992), less the mean over all tokens."""
    to_go = [[sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in rewards]
    baseline = mean([x for row in to_go for x in row])
    return [[x - baseline for x in row] for row in to_go]


def of_a_group(method, returns, ddof=1):
    """The advantage of each response of a prompt from the returns of all of them."""
    n, out = len(returns), []
    for i in range(n):
        if method == "rloo":  # the others' mean, one by one
            out.append(returns[i] - mean([returns[j] for j in range(n) if j != i]))
        else:
            out.append(returns[i] - mean(returns))
            if method == "grpo":
                out[i] /= math.sqrt(variance(returns, ddof)) + 1e-6
    return [0.0] * n if all(x == returns[0] for x in returns) else out


def to_go_leave_one_out(group, gamma):
    """Each token's return to go less the mean of the other rows' there; a row that has ended keeps its last one."""

    def to_go(row, t):
        t = min(t, len(row) - 1)
        return sum(gamma ** (k - t) * row[k] for k in range(t, len(row)))

    out = []
    for i, row in enumerate(group):
        others = [other for j, other in enumerate(group) if j != i]
        out.append([to_go(row, t) - mean([to_go(other, t) for other in others]) for t in range(len(row))])
    return out


def without_values(method, rewards, group_size, gamma, ddof):
    """Advantages of rows of token rewards, the responses of a prompt one after the other."""
    if method in ("reinforce", "reinforce++"):
        return reinforce(rewards, gamma)
    out = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        if method == "rloo_to_go":
            out += to_go_leave_one_out(group, gamma)
            continue
        for advantage, row in zip(of_a_group(method, [sum(row) for row in group], ddof), group, strict=True):
            out.append([advantage] * len(row))
    return out


def clip(x, low, high):
    """By the real part, so that it may be differentiated by the complex step."""
    x = np.asarray(x)
    return np.where(x.real < low, low, np.where(x.real > high, high, x))


def larger(a, b):
    return np.where(np.real(a) >= np.real(b), a, b)


def smaller(a, b):
    return np.where(np.real(a) <= np.real(b), a, b)


def policy_loss(logp, old_logp, advantage, cliprange, high=None, limit=20.0):
    """-L^CLIP of one token (Schulman et al. 2017, eq. 7), with the log-ratio held within +-limit.

    high: another bound for ratios above 1 (Yu et al. 2025, eq. 8).
    """
    ratio = np.exp(clip(np.asarray(logp) - old_logp, -limit, limit))
    return -smaller(ratio * advantage, clip(ratio, 1 - cliprange, 1 + (high or cliprange)) * advantage)


def sequence_loss(logps, old_logps, advantage, cliprange, high=None):
    """The same of one response (Zheng et al. 2025, eq. 5 and 7): the ratio is the geometric mean of its tokens'."""
    log_ratio = sum(new - old for new, old in zip(logps, old_logps, strict=True)) / len(logps)
    return policy_loss(log_ratio, 0.0, advantage, cliprange, high)


def value_loss(value, old_value, target, cliprange_value):
    """Of one token, as in OpenAI's baselines PPO2."""
    clipped = old_value + clip(np.asarray(value) - old_value, -cliprange_value, cliprange_value)
    return larger((value - target) ** 2, (clipped - target) ** 2) / 2


def token_mean(rows):
    """One average over all tokens of a minibatch, given as rows of any lengths."""
    flat = [x for row in rows for x in row]
    return sum(flat) / len(flat)


def adaptive_kl(coef, kl, n, target, horizon):
    """Ziegler et al. 2019, section 2.2."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coef * (1 + error * n / horizon)


# ---- optimiser ------------------------------------------------------------------------------------------------------


def clip_grad_norm(grads, max_norm):
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)); the 1e-6 is PyTorch's documented guard.

    PyTorch's fused optimizers take the inverse of the factor, and take it in fp32.
    """
    norm = math.sqrt(sum(float(x) ** 2 for g in grads.values() for x in g.flat))
    divisor = float(np.float32(max(1.0, (norm + 1e-6) / max_norm)))
    return {name: g / divisor for name, g in grads.items()}, norm


def adamw(param, grad, m, v, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Loshchilov & Hutter 2019, algorithm 2, at its step t = 1, 2, ...; returns the new param, m and v."""
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return param - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param), m, v


# ---- GPT-2 and Qwen3 ------------------------------------------------------------------------------------------------
# Parameters are a dict of arrays with a leading axis N: N variants of one model run at once, for the complex step.


def layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight[:, None] + bias[:, None]


def softmax(z):
    e = np.exp(z - z.real.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight[:, None]


def attend(q, k, v):
    """Causal attention of one head, (N, T, size) each."""
    mixed = np.zeros_like(q)
    for t in range(q.shape[1]):
        weights = softmax((q[:, t, None] * k[:, : t + 1]).sum(-1) / math.sqrt(q.shape[-1]))
        mixed[:, t] = (weights[:, :, None] * v[:, : t + 1]).sum(1)
    return mixed


def of_layer(p, prefix):
    return {name.removeprefix(prefix): a for name, a in p.items() if name.startswith(prefix)}


def hidden_states(p, ids, n_head):
    """One sequence without padding: the states (N, T, C) after the last norm."""
    if "decoder.embed_tokens.weight" in p:
        return qwen3_states(p, ids, n_head)
    x = p["decoder.wte.weight"][:, ids] + p["decoder.wpe.weight"][:, : len(ids)]
    C = x.shape[-1]
    size = C // n_head
    layer = 0
    while f"decoder.h.{layer}.ln_1.weight" in p:
        own = of_layer(p, f"decoder.h.{layer}.")
        y = layer_norm(x, own["ln_1.weight"], own["ln_1.bias"])
        qkv = y @ own["attn.c_attn.weight"] + own["attn.c_attn.bias"][:, None]
        heads = [slice(start, start + size) for start in range(0, C, size)]
        q, k, v = qkv[..., :C], qkv[..., C : 2 * C], qkv[..., 2 * C :]
        mixed = np.concatenate([attend(q[..., cut], k[..., cut], v[..., cut]) for cut in heads], -1)
        x = x + mixed @ own["attn.c_proj.weight"] + own["attn.c_proj.bias"][:, None]
        y = layer_norm(x, own["ln_2.weight"], own["ln_2.bias"])
        y = y @ own["mlp.c_fc.weight"] + own["mlp.c_fc.bias"][:, None]
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ own["mlp.c_proj.weight"] + own["mlp.c_proj.bias"][:, None]
        layer += 1
    return layer_norm(x, p["decoder.ln_f.weight"], p["decoder.ln_f.bias"])


def turned(x, theta=10000.0):
    """Rotary embedding of one head (N, T, size): features j and j + size / 2 turn by t theta^(-2j / size)."""
    half = x.shape[-1] // 2
    out = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(half):
            angle = t * theta ** (-j / half)
            a, b = x[:, t, j], x[:, t, j + half]
            out[:, t, j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def qwen3_states(p, ids, n_head):
    """Llama with a norm of each query and key; heads share keys and values if there are fewer of these."""

    def linear(x, weight):
        return x @ weight.transpose(0, 2, 1)

    x, layer = p["decoder.embed_tokens.weight"][:, ids], 0
    while f"decoder.layers.{layer}.input_layernorm.weight" in p:
        own = of_layer(p, f"decoder.layers.{layer}.")
        size = own["self_attn.q_norm.weight"].shape[-1]
        share = n_head * size // own["self_attn.k_proj.weight"].shape[1]  # query heads of a key head
        y, mixed = rms_norm(x, own["input_layernorm.weight"]), []
        q, k, v = (linear(y, own[f"self_attn.{name}_proj.weight"]) for name in "qkv")
        for head in range(n_head):
            first, second = (slice(n * size, (n + 1) * size) for n in (head, head // share))
            query = turned(rms_norm(q[..., first], own["self_attn.q_norm.weight"]))
            key = turned(rms_norm(k[..., second], own["self_attn.k_norm.weight"]))
            mixed.append(attend(query, key, v[..., second]))
        x = x + linear(np.concatenate(mixed, -1), own["self_attn.o_proj.weight"])
        y = rms_norm(x, own["post_attention_layernorm.weight"])
        gate = linear(y, own["mlp.gate_proj.weight"])
        inner = gate / (1 + np.exp(-gate)) * linear(y, own["mlp.up_proj.weight"])
        x = x + linear(inner, own["mlp.down_proj.weight"])
        layer += 1
    return rms_norm(x, p["decoder.norm.weight"])


def embeddings(p):
    """Those of the words, with which the head is tied."""
    return next(p[f"decoder.{name}.weight"] for name in ("wte", "embed_tokens") if f"decoder.{name}.weight" in p)


def score_row(p, row, n_head, temperature, head_kind="linear"):
    """For each response token of a row, lists of (N,): log-probability, value of the state before it, entropy.

    And the log-probabilities (N, K) of all K tokens of its sampling set.
    """
    query, response = list(row["query"]), list(row["response"])
    ids = query + response
    hidden, words = hidden_states(p, ids, n_head), embeddings(p)
    logprobs, values, entropies, wholes = [], [], [], []
    for t, token in enumerate(response):
        h = hidden[:, len(query) + t - 1]  # the state before the token
        kept = np.arange(words.shape[1])
        if row.get("keep") is not None:
            kept = kept[np.asarray(row["keep"][t], dtype=bool)]
        logits = (words[:, kept] * h[:, None]).sum(-1) / temperature
        logp = logits - logits.real.max(-1, keepdims=True)
        logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
        logprobs.append(logp[:, list(kept).index(token)])
        entropies.append(-(np.exp(logp) * logp).sum(-1))
        wholes.append(logp)
        if "value_head.summary.weight" in p:
            value = (p["value_head.summary.weight"][:, 0] * h).sum(-1) + p["value_head.summary.bias"][:, 0]
            values.append(np.tanh(value) if head_kind == "tanh" else value)
    return logprobs, values, entropies, wholes


def _variants(params):
    """The model with each of its M numbers moved by ih in turn: arrays (M, *shape)."""
    total = sum(a.size for a in params.values())
    out, start = {}, 0
    for name, a in params.items():
        flat = np.tile(a.reshape(1, -1).astype(complex), (total, 1))
        for j in range(a.size):
            flat[start + j, j] += 1e-30j
        out[name], start = flat.reshape(total, *a.shape), start + a.size
    return out


def _gradients(params, losses):
    """Im f(x + ih) / h, cut into the shapes of the parameters."""
    out, start = {}, 0
    for name, a in params.items():
        out[name] = (losses[start : start + a.size].imag / 1e-30).reshape(a.shape)
        start += a.size
    return out


# ---- one whole step -------------------------------------------------------------------------------------------------


def token_kl(kind, logp, ref, whole, ref_whole):
    """k1, k2, k3 of one token, or the exact KL over its sampling set; real or complex."""
    if kind == "exact":
        return (np.exp(whole) * (whole - ref_whole)).sum(-1)
    log_r = ref - logp
    return {"k1": lambda: -log_r, "k2": lambda: log_r**2 / 2, "k3": lambda: np.exp(log_r) - 1 - log_r}[kind]()


def advantages_of(rewards, values, method, group_size, gamma, lam, ddof, whiten_rewards, whitened):
    """Advantages, returns (those of GAE), and the factor of the whitening, of some rows."""
    if whiten_rewards:
        rewards = whiten_rows(rewards, shift_mean=False, ddof=ddof)
    if method == "gae":
        pairs = [gae_row(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
        advantages, returns = [a for a, _ in pairs], [r for _, r in pairs]
    else:
        advantages, returns = without_values(method, rewards, group_size, gamma, ddof), [None] * len(rewards)
    xs = [x for row in advantages for x in row]
    if not whitened or len(xs) < 2:
        return advantages, returns, [1.0] * len(rewards)
    factor = 1 / math.sqrt(variance(xs, ddof) + 1e-8)
    return whiten_rows(advantages, ddof=ddof), returns, [factor] * len(rewards)


def average(rows, how, micro, gen_len):
    """The mean over a minibatch: of its tokens, of the means of its rows, or of the means of its micro-batches.

    Or of the sums of its rows, divided by the same number whatever their lengths (Liu et al. 2025).
    """
    if how == "gen_len":
        return sum(sum(row) for row in rows) / gen_len / len(rows)
    if how == "tokens":
        return token_mean(rows)
    if how == "sequences":
        return sum(token_mean([row]) for row in rows) / len(rows)
    parts = [rows[i : i + micro] for i in range(0, len(rows), micro)]
    return sum(token_mean(part) for part in parts) / len(parts)


def ppo_step(
    params, ref_params, rows, minibatches, *, n_head, lr, kl_coef=0.2, gamma=1.0, lam=0.95, cliprange=0.2,
    cliprange_value=0.2, vf_coef=0.1, entropy_coef=0.0, max_grad_norm=1.0, adam_eps=1e-8, temperature=1.0,
    head_kind="linear", state=None, kl_estimator="k1", kl_placement="reward", whiten_advantages=True,
    whiten_scope="batch", whiten_ddof=1, whiten_rewards=False, loss_averaging="tokens", forward_batch_size=1,
    advantages="gae", group_size=1, cliprange_high=None, policy_ratio="token", gen_len=None,
):  # fmt: skip
    """One PPO step: rewards, advantages and whitening once, then an optimizer step for each minibatch.

    params, ref_params: name -> float64 array. rows: dicts with query, response, score, which is a number or a list of
    numbers, one a token, and perhaps keep (R, V).
    minibatches: lists of row numbers, one an optimizer step, epochs one after the other.
    state: Adam's of an earlier step. Returns new params, state, statistics.

    The exact KL is a sum over the sampling set and knows nothing of the token that was drawn: as a reward it teaches
    which states to avoid, and in the loss its own gradient how to be near the reference in the present one. A KL in
    the loss is on the scale of the advantages.
    """
    params = {name: np.array(a, dtype=np.float64) for name, a in params.items()}
    single = {name: a[None] for name, a in params.items()}
    ref = {name: np.asarray(a, dtype=np.float64)[None] for name, a in ref_params.items()}
    count = range(len(rows))
    old = [score_row(single, row, n_head, temperature, head_kind) for row in rows]
    refs = [score_row(ref, row, n_head, temperature) for row in rows]
    old_logprobs = [[float(x[0]) for x in old[b][0]] for b in count]
    values = [[float(x[0]) for x in old[b][1]] for b in count]
    ref_logprobs = [[float(x[0]) for x in refs[b][0]] for b in count]
    rewards = []
    for b in count:
        parts = zip(old_logprobs[b], ref_logprobs[b], old[b][3], refs[b][3], strict=True)
        kl = [float(np.squeeze(token_kl(kl_estimator, *part))) for part in parts]
        rewards.append([-kl_coef * x if kl_placement == "reward" else 0.0 for x in kl])
        if isinstance(rows[b]["score"], list):
            rewards[-1] = [r + s for r, s in zip(rewards[-1], rows[b]["score"], strict=True)]
        else:
            rewards[-1][-1] += rows[b]["score"]
    settings = (advantages, group_size, gamma, lam, whiten_ddof, whiten_rewards, whiten_advantages)
    with_values = advantages == "gae"
    if whiten_scope == "sequence":
        groups = [advantages_of([rewards[b]], [values[b]], *settings) for b in count]
        advantages, returns, factors = ([group[i][0] for group in groups] for i in range(3))
    else:
        advantages, returns, factors = advantages_of(rewards, values, *settings)

    zeros = {name: np.zeros_like(a) for name, a in params.items()}
    state = {"t": 0, "m": zeros, "v": zeros} if state is None else state
    state = {"t": state["t"], "m": dict(state["m"]), "v": dict(state["v"])}
    log = {"policy": [], "value": [], "norm": [], "clipped": 0, "limited": 0}
    for chosen in minibatches:
        if whiten_scope == "minibatch":
            group = advantages_of([rewards[b] for b in chosen], [values[b] for b in chosen], *settings)
            advantages, returns, factors = (dict(zip(chosen, part, strict=True)) for part in group)
        variants = _variants(params)
        policy, value, bonus, penalty = [], [], [], []
        for b in chosen:
            new = score_row(variants, rows[b], n_head, temperature, head_kind)
            tokens = range(len(rows[b]["response"]))
            clips = cliprange, cliprange_high
            if policy_ratio == "sequence":
                policy.append([sequence_loss(new[0], old_logprobs[b], advantages[b][0], *clips)])
            else:
                policy.append([policy_loss(new[0][t], old_logprobs[b][t], advantages[b][t], *clips) for t in tokens])
            if with_values:
                value.append([value_loss(new[1][t], values[b][t], returns[b][t], cliprange_value) for t in tokens])
            bonus.append(new[2])
            pairs = zip(new[0], ref_logprobs[b], new[3], refs[b][3], strict=True)
            penalty.append([factors[b] * token_kl(kl_estimator, *pair) for pair in pairs])
            log_ratios = [new[0][t][0].real - old_logprobs[b][t] for t in tokens]
            log["clipped"] += sum(not math.log(1 - cliprange) <= x <= math.log(1 + cliprange) for x in log_ratios)
            log["limited"] += sum(abs(x) > 20 for x in log_ratios)
        policy, value, bonus, penalty = (
            average(x, loss_averaging, forward_batch_size, gen_len) if x else np.zeros(1)
            for x in (policy, value, bonus, penalty)
        )
        loss = policy + vf_coef * value - entropy_coef * bonus
        if kl_placement == "loss" or kl_estimator == "exact":
            loss = loss + kl_coef * penalty
        grads, norm = clip_grad_norm(_gradients(params, loss), max_grad_norm)
        state["t"] += 1
        for name in params:
            params[name], state["m"][name], state["v"][name] = adamw(
                params[name], grads[name], state["m"][name], state["v"][name], state["t"], lr, eps=adam_eps
            )
        log["policy"].append(policy[0].real)
        log["value"].append(value[0].real)
        log["norm"].append(norm)
    stats = {
        "objective/kl": mean([sum(a) - sum(b) for a, b in zip(old_logprobs, ref_logprobs, strict=True)]),
        "ppo/loss/policy": mean(log["policy"]),
        "ppo/loss/value": mean(log["value"]),
        "ppo/grad_norm": mean(log["norm"]),
        "clipped": log["clipped"],
        "limited": log["limited"],
    }
    return params, state, stats
