"""Hand a trained model on: a folder that diffusers opens, with a model card.

    python export.py runs/ldm_.../ckpts/best.pt FOLDER

FOLDER gets unet/, vae/ and scheduler/ with config.json and safetensors, classes.json, a pipeline.py
that samples with them, and a README.md that says what the model is made of and how good it is. A
model that draws copies of its patients, or was not evaluated, is not handed on unless asked for.
"""
import argparse
import json
import os
import pathlib
import shutil
import tempfile

import torch

import diffusion
import experiment
from lib import diffusers_io
import metrics
from args import BooleanFlag, bare_parser, file_path, parse_bare
from experiment import fail

HERE = pathlib.Path(__file__).resolve().parent
CARD = """---
library_name: diffusers
tags: [chest-x-ray, latent-diffusion, synthetic]
---
# Synthetic chest X-rays: {task}

A class-conditional latent diffusion model. **All images that it draws are synthetic**: none is of a
patient, and none says anything about one.

    pip install torch diffusers safetensors pillow
    python pipeline.py --num_samples=4 --out=samples

(`--steps` must divide 1000, unless the scheduler is FlowMatchEulerDiscreteScheduler.)

| | |
| --- | --- |
| data set | {data} |
| classes, training images | {classes} |
| images | {img_size} x {img_size} pixels, grey, from -1 (black) to 1 |
| latents | {latent}, scale factor {scale:.6g} |
| training | {step} steps of {batch} images, averaged weights; {start} |
| autoencoder | {autoencoder} |
| process | prediction {prediction}, noise schedule {noise_schedule}, guidance {guidance_scale:g} |
| code | commit {commit} |

## Evaluation

{evaluation}

## Intended use

Research on generative models and on training with synthetic images. Not for diagnosis, nor as
evidence of what a disease looks like: the model knows the films that it, its autoencoder and any
model that it started from were trained on, their sites and their devices, and nothing else.
"""
FEWEST_SAMPLES = 100  # of an evaluation, to say that a model makes no copies


def build_parser():
    """Parser of this program."""
    parser = bare_parser(__doc__)
    add = parser.add_argument
    add("ckpt", type=file_path, help="ckpts/best.pt, or last.pt, of a train_ldm.py run")
    add("folder", type=file_path, help="folder to make")
    add("--ae_ckpt_path", type=file_path,
        help="the autoencoder's checkpoint, if it is not where training had it")
    add("--evaluation", type=file_path,
        help="evaluation.json that evaluate.py wrote of this checkpoint; None: in the run folder")
    add("--allow_copies", action=BooleanFlag, default=False,
        help="also a model that repeats training images more often than chance allows")
    add("--without_evaluation", action=BooleanFlag, default=False, help="also one not evaluated")
    return parser


# --- may it be handed on? -----------------------------------------------------------------------


def incomplete(report, class_names):
    """Why an evaluation.json is not enough to judge a model of these classes by; None: it is."""
    if "copies" not in report:
        return "holds no search for copies: there were too few training images"
    drawn = report["num_samples"]
    if lacking := [name for name in class_names if name not in drawn]:
        return f"has no samples of class {', '.join(lacking)}"
    if sum(drawn.values()) < FEWEST_SAMPLES:
        return f"is of {sum(drawn.values())} samples, under {FEWEST_SAMPLES}"
    return None


def read_evaluation(args, settings, class_names):
    """The evaluation.json of this checkpoint; None where there is none and --without_evaluation
    allows that. Ends the program where it is missing, or where it says that samples are copies of
    patients. settings: of its training; class_names: those that it was trained on."""
    path = pathlib.Path(args.evaluation or experiment.run_folder(args.ckpt) / "evaluation.json")
    report, missing = {}, f"no {path}"
    if path.exists():
        report = experiment.read_json(path, "evaluation")
        missing = f"{path} is of {report.get('ckpt', 'other samples')}, not of {args.ckpt}"
    if report.get("ckpt_sha256") == experiment.sha256_file(args.ckpt):
        lacks = incomplete(report, class_names)
        missing = f"{path} {lacks}" if lacks else None
    if missing and args.without_evaluation:
        return None
    if missing:
        command = experiment.command_line(
            "evaluate.py", ckpt=args.ckpt, num_samples=FEWEST_SAMPLES,
            **experiment.data_flags(argparse.Namespace(**settings)))
        fail(f"{missing}: measure it with `{command}`, or give --without_evaluation")
    if report["copies"]["probability"] < metrics.BY_CHANCE and not args.allow_copies:
        fail(f"{100 * report['copies']['share']:.1f} % of the samples of {args.ckpt} are copies of "
             "training images, more than chance allows, so it would hand patients on: train for "
             "fewer steps or on more images, or give --allow_copies")
    return report


# --- the parts ----------------------------------------------------------------------------------


def make_scheduler(denoiser):
    """The diffusers scheduler of a Denoiser. Ends the program where there is none."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    schedule, prediction = denoiser.schedule, denoiser.prediction
    if prediction == schedule.name == "flow" and schedule.zero_terminal_snr:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if schedule.name == "flow" or prediction not in kinds:
        fail(f"diffusers has no scheduler for prediction {prediction} on the noise schedule "
             f"{schedule.name}, zero terminal SNR {schedule.zero_terminal_snr}")
    # Its step k is our time k / 1000, so there is a step 0, which is clean.
    alphas_cumprod = schedule.alpha(torch.linspace(0, 1, 1001, dtype=torch.float64)) ** 2
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return DDIMScheduler(
        num_train_timesteps=1001, trained_betas=[0.0, *betas.tolist()],
        prediction_type=kinds[prediction], clip_sample=prediction == "eps",
        clip_sample_range=diffusion.EPS_BOUND)


def write_parts(folder, denoiser, vae, vae_settings, checkpoint):
    """unet/, vae/, scheduler/, classes.json and pipeline.py of a model in a folder."""
    from diffusers import AutoencoderKL, UNet2DModel

    from lib.exported_pipeline import CXRAutoencoder
    settings, class_names = checkpoint["args"], checkpoint["class_names"]
    unet = UNet2DModel(**diffusers_io.unet_config(settings, checkpoint["latent_shape"],
                                             len(class_names)))
    unet.load_state_dict(diffusers_io.to_diffusers(denoiser.unet, diffusers_io.unet_names(denoiser.unet)))
    config = diffusers_io.vae_config(vae_settings, checkpoint["latent_scale_factor"])
    kind = CXRAutoencoder if "patch_size" in config else AutoencoderKL
    autoencoder = kind(**config)
    autoencoder.load_state_dict(diffusers_io.to_diffusers(vae, diffusers_io.vae_names(vae)))
    unet.save_pretrained(folder / "unet")
    autoencoder.save_pretrained(folder / "vae")
    make_scheduler(denoiser).save_pretrained(folder / "scheduler")
    told = {"classes": {class_names[c]: c for c in checkpoint["trained_classes"]},
            **{name: settings[name] for name in ("guidance_scale", "guidance_interval")}}
    (folder / "classes.json").write_text(json.dumps(told, indent=2) + "\n")
    shutil.copyfile(HERE / "lib" / "exported_pipeline.py", folder / "pipeline.py")


# --- the model card -----------------------------------------------------------------------------


def describe_evaluation(report):
    """Markdown of an evaluation.json: distances with their baselines, copies, use; None: none."""
    if report is None:
        return "Not evaluated: nobody looked for copies of training images."
    sampled = (f"{report['sampler']}, {report['num_sampling_steps']} steps, guidance "
               f"{report['guidance_scale']:g}")
    lines = [f"By evaluate.py on split {report['split']}, samples drawn by {sampled} (pipeline.py "
             "takes the Euler or DDIM steps that diffusers has, `--sampler=ddim` of sample.py). "
             "Baseline: real training images in the place of the samples.", "",
             "| feature space | images | FID | FID, baseline | KID | KID, baseline |",
             "| --- | --- | --- | --- | --- | --- |"]
    for space, groups in report["groups"].items():
        ours, real = groups["all"]["samples"], groups["all"].get("baseline", {})
        cells = [f"{row[name]:.4g}" if row.get(name) is not None else ""
                 for name in ("fid", "kid") for row in (ours, real)]
        lines.append(f"| {report['features'][space]} | {ours['num']} | {' | '.join(cells)} |")
    copies = report["copies"]
    total = sum(report["num_samples"].values())
    low, high = metrics.binomial_interval(round(copies["share"] * total), total)
    lines += ["", f"**Copies of training images**: {100 * copies['share']:.1f} % of {total} "
              f"samples (95 % interval {100 * low:.1f} to {100 * high:.1f} %) lie closer to one of "
              f"{copies['distinct']} training images than these lie to one another. By chance "
              f"{100 * copies['expected']:.1f} % would, and as many as here or more with a "
              f"probability of {copies['probability']:.2g}. Copies of the images that made its "
              "autoencoder, or a model that it started from, were not looked for.", ""]
    for name, (value, low, high) in report.get("auroc", {}).items():
        lines.append(f"- AUROC of a classifier trained on {name}: {value:.2f} ({low:.2f} to "
                     f"{high:.2f})")
    warnings = [f"- {v['level'].upper()} {v['metric']} {v['value']}: {v['meaning']}"
                for v in report["verdicts"] if v["level"] != "ok"]
    if warnings:
        lines += ["", "What evaluate.py warns of:", "", *warnings]
    return "\n".join(lines)


def describe_data(settings):
    """Which images a dict of a trainer's settings names, without the path to them."""
    if not settings["data_root"]:
        return "procedural phantoms: no patient was involved"
    root = pathlib.Path(settings["data_root"]).resolve().name
    return f"{root}/{settings['task']}, split {settings['split']}"


def model_card(checkpoint, vae_settings, meta, report):
    """README.md of the folder; meta: of the run's run_meta.json."""
    settings = checkpoint["args"]
    trained = [checkpoint["class_names"][c] for c in checkpoint["trained_classes"]]
    counts = {name: count for name, count, _ in meta["data"] if name in trained}
    classes = ", ".join(f"{name} ({count})" for name, count in counts.items())
    if settings["overfit_k"]:
        classes += f"; {settings['overfit_k']} of these images, to memorise them"
    start = "started from random weights"
    if settings["init_from"]:
        parent = experiment.run_folder(settings["init_from"]).name
        start = f"started from the model {parent}, which was trained on images of its own"
    if settings["augment"]:
        start += f"; {settings['augment']} augmented versions of each image"
    autoencoder = f"trained on {describe_data(vae_settings)}"
    if vae_settings["init_from"]:
        autoencoder += f"; started from {pathlib.Path(vae_settings['init_from']).name}"
    return CARD.format(
        **{name: settings[name] for name in ("task", "img_size", "prediction", "noise_schedule",
                                             "guidance_scale")},
        data=describe_data(settings), classes=classes, start=start, autoencoder=autoencoder,
        latent="x".join(map(str, checkpoint["latent_shape"])),
        scale=checkpoint["latent_scale_factor"], step=checkpoint["step"],
        batch=experiment.step_batch(settings) * meta["world_size"],
        commit=meta["git_commit"] or "unknown", evaluation=describe_evaluation(report))


# --- the program --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_bare(build_parser(), argv)
    try:
        import diffusers  # noqa: F401
        import safetensors
    except ImportError:
        fail("export.py needs diffusers: pip install diffusers safetensors")
    folder = pathlib.Path(args.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is there already: give another folder, or remove it")
    procs = experiment.setup_processes(argparse.Namespace(device="cpu"))
    denoiser, vae, checkpoint = experiment.load_ldm(args.ckpt, procs, args.ae_ckpt_path)
    ae_path = args.ae_ckpt_path or experiment.autoencoder_of(checkpoint, args.ckpt)
    vae_settings = experiment.stored_settings(ae_path, "vae")
    trained = [checkpoint["class_names"][c] for c in checkpoint["trained_classes"]]
    run = experiment.run_folder(args.ckpt)
    try:
        report = read_evaluation(args, checkpoint["args"], trained)
        card = model_card(checkpoint, vae_settings, experiment.read_meta(run), report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        fail(f"run_meta.json or the evaluation of {run} is damaged or of another version "
             f"({type(e).__name__}: {experiment.first_line(e)}): run evaluate.py again")
    experiment.make_folder(folder.parent)
    # Whole or not at all: made beside its place, and put there at once.
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export_") as temporary:
            made = pathlib.Path(temporary, "made")
            made.mkdir()
            write_parts(made, denoiser, vae, vae_settings, checkpoint)
            (made / "README.md").write_text(card)
            os.replace(made, folder)
    except (OSError, safetensors.SafetensorError) as e:
        fail(f"cannot write {folder}: {experiment.first_line(e)}")
    print(f"written: {folder}; samples: python {folder}/pipeline.py --num_samples=4")


if __name__ == "__main__":
    main()
