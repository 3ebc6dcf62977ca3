r"""
What does it cost to store one draw of every latent, as published, instead of drawing at every step?

    python -m benchmarks.posterior ct.nii.gz
    python -m benchmarks.posterior ct.nii.gz --vae path/to/pipeline/vae

It encodes a CT and prints the share of the latents' variance that is the posterior's noise, and two tables: the losses
that noise alone costs, which no network gets below; and the losses of small UNets trained on one half of the CT with a
stored draw, with the mean and with fresh draws, on what they saw and on the other half. Without --vae it trains a
narrow VAE first, for minutes where a real one takes days: it reconstructs badly and keeps more noise than a real one.
That is why the UNets are also trained with the posterior's variance scaled to given shares.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from maisi_diffusers import AutoencoderKLMaisi, MaisiRFlowScheduler, MaisiUNet3DConditionModel
from maisi_diffusers.imaging import load_volume, modality_code, to_ras
from maisi_diffusers.training.latents import (
    draw_latent,
    encode_volume,
    nearest_multiple,
    resize_volume,
    to_intensities,
)

# Published: the KL summed over the latent, times this, on patches of 64 voxels and then of 128. The sum grows with the
# patch, so what it weighs against an L1 averaged over voxels does too.
KL_WEIGHT = 1e-7
PATCH, CROP, BATCH = 32, 8, 2  # voxels of the volume, voxels of the latent, how many of each a step
KINDS = ("sample", "mean", "moments")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="CT in HU")
    parser.add_argument("--vae", help="folder of a VAE in diffusers' layout; a narrow one is trained if not given")
    parser.add_argument("--train_steps", type=int, default=400, help="steps of the narrow VAE")
    parser.add_argument("--kl_patch", type=int, default=64, help="weigh its KL as on patches of this many voxels")
    parser.add_argument("--unet_steps", type=int, default=600, help="steps of every UNet")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.01], help="scale the noise to these shares too")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def random_crop(volume: torch.Tensor, size: int) -> torch.Tensor:
    """A cube of a volume (C, X, Y, Z)."""
    starts = [int(torch.randint(n - size + 1, ())) for n in volume.shape[1:]]
    return volume[(slice(None), *(slice(start, start + size) for start in starts))]


def train_vae(volume: torch.Tensor, steps: int, kl_patch: int) -> AutoencoderKLMaisi:
    """A narrow VAE, trained on patches of one volume (1, X, Y, Z) by L1 and KL."""
    vae = AutoencoderKLMaisi(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8)
    optimizer = torch.optim.Adam(vae.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    kl_weight = KL_WEIGHT * (kl_patch / PATCH) ** 3
    for step in range(1, steps + 1):
        patches = torch.stack([random_crop(volume, PATCH) for _ in range(BATCH)])
        posterior = vae.encode(patches).latent_dist
        l1 = F.l1_loss(vae.decode(posterior.sample()).sample, patches)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / BATCH
        optimizer.zero_grad()
        (l1 + kl_weight * kl).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            share = noise_share(posterior.parameters.detach().transpose(0, 1).flatten(1))
            print(f"<!-- VAE, step {step}: L1 {l1.item():.4f}, noise {share:.1%} -->", flush=True)
    return vae.eval()


def scale_noise(moments: torch.Tensor, share: float) -> torch.Tensor:
    """Moments (2C, X, Y, Z) whose posterior variance is this share of the variance of a draw."""
    mean, logvar = moments.chunk(2)
    wanted = share / (1 - share) * mean.var()
    return torch.cat([mean, logvar + torch.log(wanted / logvar.exp().mean())])


def noise_share(moments: torch.Tensor) -> float:
    """Posterior variance over the variance of a draw."""
    mean, logvar = moments.chunk(2)
    noise = logvar.exp().mean()
    return float(noise / (mean.var() + noise))


def velocity_variance(noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """
    Variance of z - eps given (1 - t) z + t eps, where z is normal with a known mean and the variance `noise`, and eps
    standard normal: what is left to guess for a network that knows mean and variance.
    """
    return noise / ((1 - t) ** 2 * noise + t**2)


def epsilon_variance(noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Variance of eps given sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps, likewise."""
    return alpha_bar * noise / (alpha_bar * noise + 1 - alpha_bar)


def floors(share: float) -> list[float]:
    """
    L1 and then MSE that noise alone costs: velocity with uniform timesteps, velocity with those of a latent of 128^3,
    and epsilon. Latents are scaled to variance 1, as they are for the UNet.
    """
    noise = torch.tensor(share, dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    shifted = MaisiRFlowScheduler().transform_timesteps(uniform * 1000, 128**3).double() / 1000
    ddpm = DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    variances = [
        velocity_variance(noise, uniform),
        velocity_variance(noise, shifted),
        epsilon_variance(noise, ddpm.alphas_cumprod.double()),
    ]
    # The mean distance of a normal variable from its middle is sqrt(2 / pi) standard deviations.
    l1 = [math.sqrt(2 / math.pi) * variance.sqrt().mean().item() for variance in variances]
    return l1 + [variance.mean().item() for variance in variances]


def loss_of(
    unet: MaisiUNet3DConditionModel, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """L1 between the velocity of latents (N, C, X, Y, Z) and the prediction at times t (N,) in 0..1."""
    weight = t.view(-1, 1, 1, 1, 1)
    prediction = unet((1 - weight) * latents + weight * noise, 1000 * t).sample
    return F.l1_loss(prediction, latents - noise)


def train_unet(
    moments: torch.Tensor, kind: str, steps: int, seed: int
) -> tuple[MaisiUNet3DConditionModel, torch.Tensor]:
    """A small UNet, trained on crops of one latent; and the draw that was stored for it."""
    torch.manual_seed(seed)
    channels = len(moments) // 2
    unet = MaisiUNet3DConditionModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 64),
        layers_per_block=1,
        attention_levels=(False, False),
        num_class_embeds=None,
        use_spacing=False,
    )
    generator = torch.Generator().manual_seed(seed)
    stored = draw_latent(moments, generator)
    optimizer = torch.optim.Adam(unet.parameters(), 5e-4)
    for _ in range(steps):
        # One crop of them all, so that every kind sees the same crops, timesteps and noise.
        both = torch.stack([random_crop(torch.cat([moments, stored]), CROP) for _ in range(BATCH)])
        fresh = torch.stack([draw_latent(crop[:-channels], generator) for crop in both])
        latents = {"sample": both[:, -channels:], "mean": both[:, :channels], "moments": fresh}[kind]
        loss = loss_of(unet, latents, torch.randn(latents.shape), torch.rand(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet.eval(), stored


@torch.no_grad()
def validate(unet: MaisiUNet3DConditionModel, latent: torch.Tensor, seed: int, batches: int = 32) -> float:
    """Mean L1 over crops of a latent; the same crops, timesteps and noise for every network."""
    torch.manual_seed(seed)
    losses = []
    for times in ((torch.arange(4 * batches) + 0.5) / (4 * batches)).view(4, batches).T:
        crops = torch.stack([random_crop(latent, CROP) for _ in times])
        losses.append(loss_of(unet, crops, torch.randn(crops.shape), times))
    return float(torch.stack(losses).mean())


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    volume = to_intensities(to_ras(load_volume(args.image)), modality_code("ct"))
    volume = resize_volume(volume, nearest_multiple(volume.shape, 32))
    if args.vae is None:
        vae = train_vae(torch.from_numpy(volume.get_fdata(dtype="float32"))[None], args.train_steps, args.kl_patch)
    else:
        vae = AutoencoderKLMaisi.from_pretrained(args.vae)
    moments = encode_volume(vae, volume)
    with torch.inference_mode():
        decoded = vae.decode(draw_latent(moments)[None]).sample[0, 0]
    error = (decoded - torch.from_numpy(volume.get_fdata(dtype="float32"))).abs().mean() * 2000
    measured = noise_share(moments)
    print(f"VAE: error {error:.0f} HU in the mean, noise {measured:.2%} of the latents' variance\n")

    print("| noise | L1, v | L1, v, 128^3 | L1, epsilon | MSE, v | MSE, v, 128^3 | MSE, epsilon |")
    print("|---|---|---|---|---|---|---|")
    for share in sorted({0.0, 0.001, 0.005, 0.01, 0.05, measured, *args.shares}):
        print(f"| {share:.2%} | " + " | ".join(f"{value:.3f}" for value in floors(share)) + " |")

    print("\n| noise | latents | seen, as stored | seen, fresh draws | held out, fresh draws | held out, means |")
    print("|---|---|---|---|---|---|")
    for scaled in [moments, *(scale_noise(moments, share) for share in args.shares)]:
        # Latents of variance 1. The two halves of the patient are alike and of one size.
        mean, logvar = scaled.chunk(2)
        factor = 1 / draw_latent(scaled, torch.Generator().manual_seed(args.seed)).std()
        scaled = torch.cat([mean * factor, logvar + 2 * factor.log()])
        seen, held_out = scaled.chunk(2, dim=1)
        fresh = torch.Generator().manual_seed(args.seed + 1)
        seen_draw, held_out_draw = draw_latent(seen, fresh), draw_latent(held_out, fresh)
        for kind in KINDS:
            unet, stored = train_unet(seen, kind, args.unet_steps, args.seed)
            as_stored = {"sample": stored, "mean": draw_latent(seen), "moments": seen_draw}[kind]
            latents = (as_stored, seen_draw, held_out_draw, draw_latent(held_out))
            losses = " | ".join(f"{validate(unet, latent, args.seed):.3f}" for latent in latents)
            print(f"| {noise_share(scaled):.2%} | {kind} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
