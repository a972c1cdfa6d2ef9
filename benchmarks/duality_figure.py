"""One figure of the duality: latent paths, their projection, and the locked threshold. Writes `docs/duality.png`.

python -m benchmarks.duality_figure [--output docs/duality.png]
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from modeling_mcd.noise_schedule_mdlm import LogLinearSchedule
from trainers.duality import is_largest, latent, locking_quantile, locking_scalar


VOCABULARY, TOKENS, SEED = 8, 24, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "duality.png")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(SEED)
    x_0 = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    eps = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64, generator=generator)
    u = locking_scalar(x_0, eps)
    times = torch.linspace(1e-3, 1, 400, dtype=torch.float64)
    gamma = LogLinearSchedule().gamma(times)
    paths = torch.stack([latent(x_0, eps, ratio) for ratio in locking_quantile(gamma, VOCABULARY)])  # [400, TOKENS, K]
    visible = torch.stack([is_largest(w_t, x_0) for w_t in paths])

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    latents, raster, threshold = figure.subplots(1, 3)
    token = (u - 0.5).abs().argmin().item()  # one that is hidden half-way
    for j in range(VOCABULARY):
        is_x_0 = j == x_0[token]
        style = {"color": "tab:blue", "linewidth": 2.5} if is_x_0 else {"color": "grey", "linewidth": 0.8}
        latents.plot(times, paths[:, token, j], label="the token $x_0$" if is_x_0 else None, **style)
    hidden_at = times[~visible[:, token]][0]
    latents.axvline(hidden_at, color="tab:red", linestyle=":", label="overtaken: from here on [MASK]")
    latents.set(title=f"latent path $w_t$ of one token, K = {VOCABULARY}", xlabel="t", ylabel="coordinates of $w_t$")

    order = u.argsort()
    extent = (0, 1, TOKENS, 0)
    raster.imshow(visible[:, order].T, aspect="auto", extent=extent, cmap="Blues", vmin=-0.3, interpolation="nearest")
    raster.plot(LogLinearSchedule().inverse(u[order]), torch.arange(TOKENS) + 0.5, "r_", markersize=8)
    raster.set(title="projection: visible (dark) or [MASK], from $w_t$", xlabel="t", ylabel="tokens, ordered by u")

    threshold.plot(times, gamma, color="black", linewidth=2, label="$\\gamma_t = F_Y(a_t / s_t)$")
    for value in u:
        end = LogLinearSchedule().inverse(value).clamp(max=1).item()
        threshold.plot([0, end], [value, value], color="tab:blue", linewidth=1)
        threshold.plot([end, 1], [value, value], color="tab:red", linewidth=0.5, alpha=0.5)
    threshold.set(title="locked threshold: visible while $u = F_Y(Y) \\leq \\gamma_t$", xlabel="t", ylabel="u")
    latents.legend(loc="lower left")
    threshold.legend(loc="upper right")
    figure.savefig(options.output, dpi=110)
    agree = torch.equal(visible, u[None] <= gamma[:, None])
    print(
        f"{options.output}: {visible.numel()} points, projection and threshold agree at {'all' if agree else 'NOT ALL'} of them"
    )


if __name__ == "__main__":
    main()
