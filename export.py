"""Export a trained model: a folder that diffusers opens, with a model card.

    python export.py --ckpt=runs/ldm_.../ckpts/best.pt --out_dir=FOLDER

FOLDER gets unet/, vae/ and scheduler/, a model_index.json and pipeline.py, and a README.md with
training data and evaluation. A model that copies training images, or was not searched for copies,
is refused without --allow_copies.
"""
import argparse
import json
import pathlib
import shutil

import torch

import data
import diffusion
import sample
from lib import dist, metrics, run, verdicts
from lib.args import BooleanFlag, Parser, file_path, parse_settings
from lib.diffusers_io import to_diffusers, unet_config, unet_names, vae_config, vae_names
from lib.files import command_line, data_flags, fail, make_folder, read_json, read_meta

FEWEST_SAMPLES = 100  # that an evaluation must have searched for copies


# --- may it be exported? ------------------------------------------------------------------------


def read_evaluation(args, checkpoint, meta):
    """evaluation.json of the run; meta: its run_meta.json. None if it has no search for copies by
    this checkpoint. Exits with an error then, or if copies were found, unless --allow_copies."""
    path = run.run_folder(args.ckpt) / "evaluation.json"
    report = read_json(path)
    samples = report.get("num_samples", {})
    searched = (report.get("ckpt_sha256") == checkpoint["sha256"] and "copies" in report
                and report.get("data", meta["data"]) == meta["data"]
                and sum(samples.values()) >= FEWEST_SAMPLES
                and samples.keys() >= sample.trained_classes(checkpoint).keys())
    problem = None
    if not searched:
        command = command_line("evaluate.py", ckpt=args.ckpt, num_samples=FEWEST_SAMPLES,
                               **data_flags(argparse.Namespace(**checkpoint["args"])))
        problem = (f"{path} has no search for copies in {FEWEST_SAMPLES} samples of all classes of "
                   f"{args.ckpt}: run `{command}`")
    elif report["copies"]["probability"] < metrics.BY_CHANCE:
        problem = (f"{100 * report['copies']['share']:.1f} % of the samples of {args.ckpt} are "
                   "copies of training images, more than chance allows: train for fewer steps or "
                   "on more images")
    if problem and not args.allow_copies:
        fail(f"{problem}, or give --allow_copies")
    return report if searched else None


# --- the parts ----------------------------------------------------------------------------------


def make_scheduler(denoiser):
    """The diffusers scheduler of a Denoiser; exits with an error if there is none."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    schedule, prediction = denoiser.schedule, denoiser.prediction
    if prediction == schedule.name == "flow" and schedule.zero_terminal_snr:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if schedule.name == "flow" or prediction not in kinds:
        fail(f"diffusers has no scheduler for prediction {prediction} on the noise schedule "
             f"{schedule.name}, zero terminal SNR {schedule.zero_terminal_snr}")
    # Its step k is our time (k + 1) / 1000: trailing steps begin at pure noise, and none is clean.
    alphas_cumprod = schedule.alpha(torch.linspace(0, 1, 1001, dtype=torch.float64)) ** 2
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return DDIMScheduler(
        trained_betas=betas.tolist(), timestep_spacing="trailing",
        prediction_type=kinds[prediction], clip_sample=prediction == "eps",
        clip_sample_range=diffusion.EPS_BOUND)


def write_parts(folder, denoiser, vae, vae_settings, checkpoint):
    """Write unet/, vae/, scheduler/, model_index.json and pipeline.py into a folder."""
    import diffusers

    from lib import exported_pipeline
    settings, num_classes = checkpoint["args"], len(checkpoint["class_names"])
    unet = diffusers.UNet2DModel(**unet_config(settings, vae.latent_shape, num_classes))
    unet.load_state_dict(to_diffusers(denoiser.unet, unet_names(denoiser.unet)))
    config = vae_config(vae_settings, checkpoint["latent_scale_factor"])
    plain, weights = "patch_size" not in config, to_diffusers(vae, vae_names(vae))
    if not plain:
        weights = {name if name.startswith("linear_") else f"network.{name}": weight
                   for name, weight in weights.items()}
    autoencoder = (diffusers.AutoencoderKL if plain else exported_pipeline.CXRAutoencoder)(**config)
    autoencoder.load_state_dict(weights)
    parts = {"unet": unet, "vae": autoencoder, "scheduler": make_scheduler(denoiser)}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    shutil.copyfile(exported_pipeline.__file__, folder / "pipeline.py")
    if not plain:  # diffusers looks for the class of a part beside the part
        index["vae"][0] = "pipeline"
        shutil.copyfile(exported_pipeline.__file__, folder / "vae" / "pipeline.py")
    index |= {"_class_name": ["pipeline", "CXRPipeline"],
              "classes": sample.trained_classes(checkpoint),
              **{name: settings[name] for name in ("guidance_scale", "guidance_interval")}}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# --- the model card -----------------------------------------------------------------------------


def describe_evaluation(report):
    """Markdown of an evaluation.json: the search for copies, and all verdicts."""
    if report is None:
        return "Not evaluated: nobody looked for copies of training images."
    share, total = report["copies"]["share"], sum(report["num_samples"].values())
    low, high = metrics.binomial_interval(round(share * total), total)
    held_out = data.count_files(report.get("test_data", {}).get("held-out images", ()))
    found = verdicts.format_verdicts([verdicts.Verdict(**v) for v in report["verdicts"]])
    return f"""{100 * share:.1f} % of {total} samples are copies of training images, 95 % interval
{100 * low:.1f} to {100 * high:.1f} %. Split {report["split"]} of the data set above (images:
{held_out}), sampler {report["sampler"]} with
{report["num_sampling_steps"]} steps, guidance {report["guidance_scale"]}; pipeline.py samples with
Euler or DDIM steps. Images of the autoencoder, or of a model that training started from, were not
searched for copies.

```
{found}
```"""


def describe_data(settings):
    """Data set of a trainer's settings, without the path to it."""
    root = pathlib.Path(settings["data_root"] or "phantoms").resolve().name
    parent = "; started from a model of other images" if settings["init_from"] else ""
    return f"{root}/{settings['task']}, split {settings['split']}{parent}"


def model_card(checkpoint, vae_settings, meta, report):
    """README.md of the folder; meta: run_meta.json, report: evaluation.json or None."""
    settings, trained = checkpoint["args"], sample.trained_classes(checkpoint)
    counts = (f"{name} ({count})" for name, count, _ in meta["data"] if name in trained)
    batch = settings["batch_per_device"] * settings["grad_accum"] * meta["world_size"]
    return f"""---
library_name: diffusers
license: unknown # yours to say, within the terms of the training images
tags: [chest-x-ray, latent-diffusion, synthetic]
---
# Synthetic chest X-rays

A class-conditional latent diffusion model. **All its images are synthetic**: none shows a patient.

    pip install torch diffusers safetensors pillow
    python pipeline.py --num_samples=4 --out=samples

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
images = pipeline({next(iter(trained))!r}, num_samples=4).images  # of PIL
```

- data set: {describe_data(settings)}
- classes, training images: {", ".join(counts)}
- memorised on purpose: {settings["overfit_k"] or "none"}
- images: {settings["img_size"]} pixels wide and high, gray, from -1 (black) to 1
- training: {checkpoint["step"]} steps of {batch} images, averaged weights;
  {settings["augment"]} augmented copies per image
- autoencoder: {describe_data(vae_settings)}
- code: commit {meta["git_commit"] or "unknown"}

## Evaluation

{describe_evaluation(report)}

## Intended use

Research on generative models and on training with synthetic images. Not for diagnosis, and not as
evidence of what a disease looks like: the model reflects only the images, sites and devices that
it, its autoencoder and any model it started from were trained on.
"""


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=file_path, required=True, help="ckpts/best.pt, or last.pt, of a model")
    add("--out_dir", type=file_path, help="folder to make; None: `exported` in the run folder")
    add("--ae_ckpt_path", type=file_path, help="the autoencoder's checkpoint, if it was moved")
    add("--allow_copies", action=BooleanFlag, default=False,
        help="export a model that copies training images, or was not searched for copies")
    args = parse_settings(parser, argv)
    try:
        import diffusers  # noqa: F401
    except ImportError:
        fail("export.py needs diffusers: pip install diffusers safetensors")
    folder = pathlib.Path(args.out_dir or run.run_folder(args.ckpt) / "exported")
    if folder.exists():
        fail(f"{folder} exists: give another --out_dir, or remove it")
    ctx = dist.setup(argparse.Namespace(device="cpu"))
    denoiser, vae, checkpoint = sample.load_ldm(args.ckpt, ctx, args.ae_ckpt_path)
    vae_settings = run.load_checkpoint(checkpoint["ae_ckpt_path"], "vae")["args"]
    meta = read_meta(run.run_folder(args.ckpt))
    card = model_card(checkpoint, vae_settings, meta, read_evaluation(args, checkpoint, meta))
    write_parts(make_folder(folder), denoiser, vae, vae_settings, checkpoint)
    (folder / "README.md").write_text(card)
    print(f"written: {folder}; samples: python {folder}/pipeline.py --num_samples=4")


if __name__ == "__main__":
    main()
