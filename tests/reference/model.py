"""The blocks and the model over a dict of parameters under the released names.

`cfg` is a dict with the released names: num_layers, model_dim, z_dim, value_dim, num_heads, chunk_size,
norm_num_groups, norm_eps, norm_affine, rope_base (None = 10000), swiglu, rescale_nffn, scale_emb, share_emb; and
cema_input ("released" unless given). Functions of one block take the parameters of that block with the names
below `layers.i.mega.` and `layers.i.nffn.`.
"""

import math

import torch

from .ops import F64, cema, chunk_attention, timestep_norm


def silu(x):
    return x * torch.sigmoid(x)


def rms(x, eps):
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + eps)


def linear(x, params, name):
    y = x @ params[f"{name}.weight"].to(F64).T
    return y + params[f"{name}.bias"].to(F64) if f"{name}.bias" in params else y


def attention_block(x, params, cfg):
    """x (B, L, D) -> x + wh1(m) + wh2(attention * r), the block with its residual."""
    B, L, _ = x.shape
    H, Z, V = cfg["num_heads"], params["gamma"].shape[1], params["wv.weight"].shape[0]
    eps = cfg.get("norm_eps", 1e-5)
    x = x.to(F64)
    t, _ = timestep_norm(x, params["timenorm.weight"], params["timenorm.bias"], cfg["norm_num_groups"], eps)
    coefficients = [params[f"cema.{name}"] for name in ("alpha", "delta", "theta", "gamma", "omega")]
    e, _ = cema(t, *coefficients, cema_input=cfg.get("cema_input", "released"))
    m = rms(e, eps)
    if cfg.get("norm_affine", True):
        m = m * (params["rmsnorm.weight"].to(F64) + 1)

    z = linear(m, params, "wz").reshape(B, L, H, Z // H)
    z = rms(z, eps).reshape(B, L, Z)
    gamma, beta = params["gamma"].to(F64), params["beta"].to(F64)
    q = (z * (gamma[0] + 1) / math.sqrt(Z / H) + beta[0]).reshape(B, L, H, Z // H)
    k = (z * (gamma[1] + 1) / math.sqrt(Z / H) + beta[1]).reshape(B, L, H, Z // H)
    v = silu(linear(t, params, "wv")).reshape(B, L, H, V // H)  # from t, not from m
    r = silu(linear(m, params, "wr"))

    rope_base = cfg.get("rope_base") or 10000.0
    attended = chunk_attention(q, k, v, cfg["chunk_size"], rope_base).reshape(B, L, V)
    return x + linear(m, params, "wh1") + linear(attended * r, params, "wh2")


def feed_forward(x, residual, params, cfg):
    """x: the attention block's output; residual: the attention block's input. Both (B, L, D)."""
    x, residual = x.to(F64), residual.to(F64)
    centred = x - x.mean(dim=-1, keepdim=True)
    u = centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + cfg.get("norm_eps", 1e-5))
    if cfg.get("norm_affine", True):
        u = u * (params["norm.weight"].to(F64) + 1) + params["norm.bias"].to(F64)
    hidden = silu(linear(u, params, "fc1"))
    if cfg.get("swiglu", False):
        hidden = hidden * linear(u, params, "fc3")
    out = linear(hidden, params, "fc2")
    if cfg.get("rescale_nffn", False):
        out = params["alpha"].to(F64) * out
    return residual + out


def below(params, prefix):
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


def model(tokens, params, cfg):
    """tokens (B, L) -> logits (B, L, vocabulary)."""
    embedding = params["embed.weight"].to(F64)
    x = torch.stack([torch.stack([embedding[int(token)] for token in row]) for row in tokens])
    if cfg.get("scale_emb", False):
        x = x * math.sqrt(x.shape[-1])
    for i in range(cfg["num_layers"]):
        y = attention_block(x, below(params, f"layers.{i}.mega."), cfg)
        x = feed_forward(y, x, below(params, f"layers.{i}.nffn."), cfg)
    norm = below(params, "output.final_norm.")
    x, _ = timestep_norm(x, norm["weight"], norm["bias"], cfg["norm_num_groups"], cfg.get("norm_eps", 1e-5))
    output = embedding if cfg.get("share_emb", False) else params["output.output.weight"].to(F64)
    return x @ output.T
