"""What the training line costs around the arithmetic of a step: our loop against a bare loop with the same model.

    python benchmarks/training_step.py [--steps 60] [--hidden 64]

Both train the same LoRA on the same tiny FLUX.1 with the same batches (latents and text outputs cached in memory), in
turn, in one process. The bare loop knows no hooks, keyed draws, logging or checks: forward, loss, backward, clip,
AdamW. The difference is what a step pays for everything else, independent of the size of the model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def prepare(folder: Path, hidden: int, steps: int):
    """A complete Run on a tiny random model and noise pictures."""
    from library.training import cli, parser_common
    from library.training.trainables.network import NetworkTrainable
    from library.training.trainer_base import Trainer
    from library.training.wiring.flux import FluxFamily
    from tests.runs.conftest import Work, draw_pictures
    from tests.tiny import build_tiny_flux

    work = Work(folder, build_tiny_flux(folder / "tiny", hidden=hidden), draw_pictures(folder / "images", 16))
    argv = work.argv(
        "out", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only",
        f"--max_train_steps={steps}"
    )
    parsed = parser_common.parse_command(argv, "flux", "network")
    cli.set_up_logging(parsed.config[cli.ConsoleOptions])
    return Trainer(parsed.config, FluxFamily(parsed.config), NetworkTrainable(parsed.config)).prepare()


def bare_step(run, batch) -> None:
    """The arithmetic alone."""
    import torch

    from library.training.objective import NoisyLatents

    latents = batch.latents
    noise, sigmas = torch.randn_like(latents), torch.rand(len(latents))
    mixed = sigmas.view(-1, 1, 1, 1)
    sample = NoisyLatents(latents, (1 - mixed) * latents + mixed * noise, noise, sigmas * 1000, sigmas, noise - latents)
    output = run.family.predict(run.models, sample, batch.conditioning, batch)
    loss = torch.nn.functional.mse_loss(output.pred.float(), output.target.float())
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in run.optimizer.param_groups for p in g["params"]], 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def our_step(run, batch) -> None:
    from library.training.loop import micro_step, update

    run.hooks.on_step_start(run, batch)
    output = micro_step(run, batch)
    update(run)
    run.progress.advance()
    run.hooks.on_post_optimizer_step(run)
    run.hooks.on_step_end(run, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each loop (default: 60)")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model, a multiple of 32 (default: 64)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Path(folder), options.hidden, options.steps * 2 + 20)
        run.hooks.on_train_start(run)
        epoch = list(run.data.batches(1))
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for k in range(options.steps + 5):
            batch = epoch[k % len(epoch)]
            for name, step in (("bare", bare_step), ("ours", our_step)):
                started = time.perf_counter()
                step(run, batch)
                if k >= 5:
                    times[name].append(time.perf_counter() - started)
        bare, ours = statistics.median(times["bare"]), statistics.median(times["ours"])
        print(
            f"\nbare loop {bare * 1e3:.2f} ms, ours {ours * 1e3:.2f} ms: {(ours - bare) * 1e3:.2f} ms per step for "
            "everything else"
        )


if __name__ == "__main__":
    main()
