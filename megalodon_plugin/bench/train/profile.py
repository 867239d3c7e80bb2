"""Where a training step's time on the GPU goes, by kind of kernel."""

import re
from collections import Counter

import torch

from .results import Profile
from .trainer import TimedTrainer

# First match counts. Names of kernels: ours, cuBLAS's, the host's attention's, those that Inductor writes.
KINDS = (
    ("attention", r"attention_weights|causal_product|score_gradients|output_products|flash|fmha|cudnn.*sdpa"),
    ("CEMA", r"cema_(?!backward_view|view)\w*$|^cema"),
    ("TimestepNorm", r"^timestep_norm|^norm_summary"),
    ("loss", r"log_?softmax|logsumexp|nll_loss|cross_entropy"),
    ("optimizer", r"multi_tensor|FusedOptimizer|lpnorm"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitK"),
    ("norms and element-wise", r""),
)


def shares(trainer: TimedTrainer) -> Profile:
    """Train one more step: its milliseconds on the GPU by kind of kernel, and the longest kernels."""
    batches = trainer.batch_generator(trainer.dataloader)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.train_step(batches)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.device_time / 1e3
            calls[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, milliseconds in times.items():
        kinds[next(kind for kind, pattern in KINDS if re.search(pattern, name))] += milliseconds
    return {
        "ms": dict(kinds.most_common()),
        "kernels": [(name[:150], milliseconds, calls[name]) for name, milliseconds in times.most_common(60)],
    }


def print_shares(found: Profile) -> None:
    """One line of shares."""
    total = sum(found["ms"].values())
    parts = (f"{kind} {value:.1f} ms ({value / total:.1%})" for kind, value in found["ms"].items())
    print(f"    {total:.1f} ms on the GPU: {', '.join(parts)}", flush=True)
