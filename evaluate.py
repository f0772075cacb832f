"""Are the generated radiographs any good, are they copies of patients, and are they of use?

    python evaluate.py --ckpt=runs/ldm_.../ckpts/last.pt --data_root=DATA --task=TB
    python evaluate.py --samples_dir=FOLDER --data_root=DATA --task=TB

compares samples of a model, or a folder of images, with real films that the model has not seen (--split=val):
distances of the distributions, copies of training films, and whether a classifier learns from the samples what
holds on real films. Beside every distance stands what as many training films get: the floor, which a perfect
model of them would reach. A distance means something only with its feature space and its number of images.
"""
import hashlib
import pathlib
import statistics

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import experiment
import metrics
import sample
from experiment import fail, notice
from find_latent_scale import load_autoencoder

CLASSIFIER_SIZE = 64  # pixels that the classifier sees
PIXEL_SIZE = 32  # side of the pictures in which copies are looked for
FLOOR_DRAWS = 8  # choices of training films that the floor is a mean of


def make_parser():
    parser = experiment.make_parser(__doc__)
    sample.add_sampling_arguments(parser)
    parser.set_defaults(split="val", img_size=None, num_samples=64, sampler="dpmpp_sde", num_sampling_steps=20)
    add = parser.add_argument_group("evaluation").add_argument
    add("--samples_dir", help="folder of images to measure instead of a model: CLASS/*.png, CLASS_*.png, or what "
        "sample.py left")
    add("--features", default="classifier", help="classifier (trained here on the training split), vae, "
        "torchxrayvision, or the path of a TorchScript network")
    add("--classifier_steps", type=experiment.at_least(1), default=600, help="training of each classifier, 32 images a step")
    return parser


# --- images ------------------------------------------------------------------------------------------------


class Samples:
    """Generated images, read like a data.ImageSet. rows: uint16 [N, S, S] as data.decode makes them."""

    def __init__(self, rows, labels):
        self.rows, self.labels = rows, labels

    def __len__(self):
        return len(self.rows)

    def images(self, indices):
        """float32 [B, 1, S, S] in [-1, 1]."""
        return data.to_float(self.rows[indices])


def draw_samples(ldm, args, procs):
    """Samples of a model with 8 bits a pixel, as sample.py saves them."""
    checkpoint = ldm.checkpoint
    wanted = [(c, i) for c in ldm.classes for i in range(args.num_samples)]
    progress = experiment.Progress(procs, f"sampling ({args.sampler})", len(wanted) * args.num_sampling_steps)
    batches = sample.sample_batches(ldm.denoiser, ldm.vae, checkpoint["latent_scale_factor"], checkpoint["class_names"],
                                    wanted, args, procs, args.batch_size, progress)
    rows = [experiment.to_uint8(x)[:, 0].numpy().astype(np.uint16) * 257 for _, _, x in batches]
    return Samples(np.concatenate(rows), np.array([c for c, _ in wanted]))


def read_samples(folder, class_names, img_size):
    """Samples in a folder of images; without img_size, of the size of the first."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        fail(f"no folder --samples_dir={folder}")
    found = []
    for c, name in enumerate(class_names):
        paths = [*folder.glob(f"{name}_*"), *folder.glob(f"{name}/*")]
        found += [(p, c) for p in sorted(paths) if p.suffix.lower() in data.EXTENSIONS]
    if not found:
        fail(f"no images in {folder}: they must be called CLASS_*.png or lie in folders CLASS, "
             f"with the classes of the data, {', '.join(class_names)}")
    try:
        if img_size is None:
            with data.Image.open(found[0][0]) as image:
                img_size = min(image.size)
        rows = np.stack([data.decode(p, img_size) for p, _ in found])
    except (OSError, ValueError) as e:
        fail(f"an image in {folder} cannot be decoded: {e}")
    return Samples(rows, np.array([c for _, c in found]))


def shrink(x, size):
    """Images [N, 1, H, W] averaged down to [N, 1, size, size]."""
    return F.interpolate(x, size, mode="area")


def small_pictures(x):
    """[N, 1024] of images [N, 1, H, W]: 32 x 32 pixels with mean 0 and variance 1 each, so exposure does not count."""
    rows = shrink(x, PIXEL_SIZE).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.std(1, correction=0, keepdim=True).clamp_min(1e-6)


LOOKS = ("black_share", "darkest_percent", "detail")


def looks(x):
    """Of images [N, 1, H, W], [N, 3]: share of pixels under 5 % grey, 1st percentile of grey, and detail:
    the root mean square of what averaging 2 x 2 pixels takes away, which blurred images lack; all from 0 to 1."""
    grey = (x + 1) / 2
    even = grey[..., :grey.shape[2] // 2 * 2, :grey.shape[3] // 2 * 2]
    fine = even - F.interpolate(F.avg_pool2d(even, 2), scale_factor=2)
    flat = grey.flatten(1)
    return torch.stack([(flat < 0.05).float().mean(1), flat.kthvalue(max(1, flat.shape[1] // 100), dim=1).values,
                        fine.square().flatten(1).mean(1).sqrt()], 1)


@torch.no_grad()
def in_batches(function, images, procs):
    """function of all images, 64 at a time on the device, so that a data set need not fit into memory: [N, ...] float32
    on the CPU. images: data.ImageSet, Samples, or a tensor [N, 1, H, W]."""
    read = images.images if hasattr(images, "images") else images.__getitem__
    parts = (np.arange(start, min(start + 64, len(images))) for start in range(0, len(images), 64))
    return torch.cat([function(read(index).to(procs.device)).float().cpu() for index in parts])


# --- classifier --------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Small CNN: images [B, 1, S, S] in [-1, 1] to logits [B, num_classes], by way of 64 features."""

    def __init__(self, num_classes):
        super().__init__()
        layers, ch = [], 1
        for width in (16, 32, 64, 64):
            layers += [nn.Conv2d(ch, width, 3 if layers else 5, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            ch = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(ch, num_classes)

    def features(self, x):
        return self.body(shrink(x, CLASSIFIER_SIZE))  # [B, 64]

    def forward(self, x):
        return self.head(self.features(x))


def augment(x, rng):
    """Small rotation, zoom, shift, contrast and brightness changes of x [B, 1, S, S]; no flip: it moves the heart."""
    def uniform(most):
        return ((torch.rand(len(x), generator=rng) * 2 - 1) * most).to(x.device)
    angle, zoom = uniform(0.12), 1 + uniform(0.12)
    rows = [torch.stack([zoom * angle.cos(), -zoom * angle.sin(), uniform(0.1)], 1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), uniform(0.1)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="border")
    return x * (1 + uniform(0.3))[:, None, None, None] + uniform(0.3)[:, None, None, None]


def train_classifier(x, labels, num_classes, args, procs, label):
    """Classifier of images [N, 1, S, S] with labels [N], trained with as many images of each class."""
    torch.manual_seed(args.seed)
    net = Classifier(num_classes).to(procs.device)
    rng = torch.Generator().manual_seed(args.seed)
    members = [m for m in ((labels == c).nonzero()[:, 0] for c in range(num_classes)) if len(m)]
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.classifier_steps)
    progress = experiment.Progress(procs, f"training a classifier on {label}", args.classifier_steps)
    for step in range(args.classifier_steps):
        index = torch.cat([m[torch.randint(len(m), (32 // len(members) or 1,), generator=rng)] for m in members])
        logits = net(augment(x[index].to(procs.device), rng))
        F.cross_entropy(logits, labels[index].to(procs.device)).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        progress.update(step + 1)
    progress.clear()
    return net.eval().requires_grad_(False)


def real_classifier(x, labels, num_classes, data_key, args, procs):
    """Classifier trained on the real training images x [N, 1, S, S]; its weights are kept in the cache folder.

    data_key: ImageSet.key of the images.
    """
    settings = f"classifier 1 {data_key} {labels.tolist()} {args.seed} {args.classifier_steps}"

    def blocks():
        net = train_classifier(x, labels, num_classes, args, procs, "real films")
        yield nn.utils.parameters_to_vector(net.parameters()).cpu().numpy()[None]

    folder, key = pathlib.Path(args.output_root) / "cache", hashlib.sha256(settings.encode()).hexdigest()
    weights = data.cached_array(folder, f"classifier_{key[:16]}", blocks).rows([0])[0]
    net = Classifier(num_classes)
    nn.utils.vector_to_parameters(torch.from_numpy(weights.copy()), net.parameters())
    return net.to(procs.device).eval().requires_grad_(False)


# --- feature spaces ----------------------------------------------------------------------------------------


def feature_network(name, vae, classifier, procs):
    """(network from images [B, 1, H, W] in [-1, 1] to features [B, D], its name in the report)."""
    if name == "classifier":
        if classifier is None:
            fail("--features=classifier needs two classes to tell apart: give --features=vae or a network")
        return classifier.features, "classifier trained on the real training split, 64 features"
    if name == "vae":
        if vae is None:
            fail("--features=vae with --samples_dir needs an autoencoder: give --ae_ckpt_path")
        return (lambda x: F.adaptive_avg_pool2d(vae.encode(x).mean, 4).flatten(1)), "autoencoder means on a 4x4 grid"
    if name == "torchxrayvision":
        try:
            import torchxrayvision
        except ImportError:
            fail("--features=torchxrayvision needs that package: pip install torchxrayvision, or --features=classifier")
        net = torchxrayvision.models.DenseNet(weights="densenet121-res224-all").to(procs.device).eval()
        return (lambda x: net.features2(F.interpolate(x, (224, 224), mode="area") * 1024)), f"torchxrayvision {net.weights}"
    if not pathlib.Path(name).is_file():
        fail(f"--features={name}: classifier, vae, torchxrayvision, or the path of a TorchScript file")
    try:
        net = torch.jit.load(name, map_location=procs.device).eval()
    except RuntimeError as e:
        fail(f"{name} is no TorchScript file: {experiment.first_line(e)}")
    # The usual Inception file gives class scores unless asked.
    options = {"return_features": True} if "return_features" in {a.name for a in net.forward.schema.arguments} else {}

    def script(x):
        out = net(((x + 1) * 127.5).expand(-1, 3, -1, -1), **options)
        if out.ndim != 2 or len(out) != len(x):
            fail(f"{name} maps images [B, 3, H, W] with values 0 to 255 to {[*out.shape]}, not to features [B, D]")
        return out
    return script, f"TorchScript {pathlib.Path(name).name}"


# --- report ------------------------------------------------------------------------------------------------


def as_many(labels, like, seed):
    """Positions of a random choice from `labels` with as many members of each class as `like` has, or all there are."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:(like == c).sum()] for c in np.unique(like)])


def compare(features, real_features):
    return {"fid": metrics.frechet_distance(features, real_features),
            "kid": metrics.kernel_distance(features, real_features), **metrics.manifold_metrics(features, real_features)}


def group_rows(features, levels, labels, seed):
    """What is reported of one group of images: dicts of numbers for 'samples', 'train', 'spread', 'real' and, if it is
    in levels, 'decoded'.

    features [N, D], levels [N, 3] (see looks) and labels [N] are dicts by 'samples', 'train' and 'real'. 'train' is the
    floor: what as many training films get as there are samples, since FID falls with their number; the mean of
    FLOOR_DRAWS random choices, whose standard deviation is 'spread'.
    """
    chosen = [as_many(labels["train"], labels["samples"], [seed, draw]) for draw in range(FLOOR_DRAWS)]
    draws = [compare(features["train"][index], features["real"]) for index in chosen]
    values = {name: [draw[name] for draw in draws] for name in draws[0]}
    rows = {"samples": {"num": len(labels["samples"]), **compare(features["samples"], features["real"])},
            "train": {"num": len(chosen[0]), **{k: statistics.mean(v) for k, v in values.items()}},
            "spread": {k: statistics.stdev(v) for k, v in values.items()}, "real": {"num": len(labels["real"])}}
    for row, table in levels.items():
        rows.setdefault(row, {"num": len(table)}).update(zip(LOOKS, table.mean(0).tolist(), strict=True))
    return rows


def usefulness(sets, num_classes, judge, args, procs):
    """AUROC with 95 % bootstrap interval, (value, low, high), by what was trained on and tested on.

    sets: (images, labels) of 'samples', 'train' and 'real' (held-out). judge: Classifier trained on 'train'.
    """
    def trained_on(*names):
        x, labels = (torch.cat(parts) for parts in zip(*(sets[name] for name in names), strict=True))
        return train_classifier(x, labels, num_classes, args, procs, " and ".join(names))

    def tested_on(name, net):
        x, labels = sets[name]
        return metrics.auroc_interval(in_batches(net, x, procs), labels)
    return {"real films, tested on samples": tested_on("samples", judge),
            "real films, tested on held-out films": tested_on("real", judge),
            "samples, tested on held-out films": tested_on("real", trained_on("samples")),
            "both, tested on held-out films": tested_on("real", trained_on("train", "samples"))}


def verdicts(report):
    """The few things in a report that a reader should not miss, as metrics.Verdicts."""
    all_rows, copies = report["groups"]["all"], report["memorisation"]
    rows, floor, real_detail = all_rows["samples"], all_rows["train"], max(all_rows["real"]["detail"], 1e-6)
    detail = rows["detail"] / real_detail
    found = [
        ("memorisation", copies["share"], copies["interval"][0] > 0.2, copies["interval"][0] > copies["expected"],
         f"Share of samples closer to a training film than held-out films are; by chance {copies['expected']:.2f}.",
         "Look at the pairs picture. Train for fewer steps or on more images; do not publish copies of patients."),
        ("precision", rows["precision"], rows["precision"] < 0.2 * floor["precision"],
         rows["precision"] < 0.6 * floor["precision"],
         f"Share of samples that lie among the real films; training films have {floor['precision']:.2f}.",
         "Samples do not look real: train longer, and check the autoencoder's reconstructions."),
        ("recall", rows["recall"], rows["recall"] < 0.2 * floor["recall"], rows["recall"] < 0.6 * floor["recall"],
         f"Share of real films that lie among the samples; training films have {floor['recall']:.2f}.",
         "Samples leave much out: lower --guidance_scale, then train longer."),
        ("detail", detail, not 0.4 < detail < 2.5, not 0.7 < detail < 1.5,
         "Detail of the samples by that of real films" + (
             f"; the autoencoder leaves {all_rows['decoded']['detail'] / real_detail:.2f} of it."
             if "decoded" in all_rows else "."),
         "Too little: blurred, train the autoencoder longer or with its discriminator. Too much: noise, train longer.")]
    if "auroc" in report:
        value, low, high = report["auroc"]["real films, tested on samples"]
        found.append(("class fidelity", value, high < 0.5, low <= 0.5,
                      "AUROC on samples of a classifier that was trained on real films.",
                      "Below 0.5 the labels are swapped. Near it: train longer, raise --guidance_scale."))
    return [metrics.Verdict(name, "bad" if bad else "watch" if watch else "ok", f"{value:.3f}", meaning, advice)
            for name, value, bad, watch, meaning, advice in found]


def print_report(report):
    print(f"features: {report['features']}; distances are to the real films of split {report['split']}; train is the floor, "
          f"the mean of {FLOOR_DRAWS} choices of training films, spread their standard deviation; decoded is what the "
          "autoencoder makes of the real films")
    print(f"{'':<12} {'':<8} {'N':>5} {'FID':>9} {'KID':>9} {'precision':>10} {'recall':>7} {'density':>8} {'coverage':>9} "
          f"{'black':>7} {'darkest':>8} {'detail':>7}")
    for name, rows in report["groups"].items():
        for row, v in rows.items():
            distances = (f"{v['fid']:9.3f} {v['kid']:9.4f} {v['precision']:10.3f} {v['recall']:7.3f} "
                         f"{v['density']:8.3f} {v['coverage']:9.3f}" if "fid" in v else " " * 57)
            seen = f"{v['black_share']:7.3f} {v['darkest_percent']:8.4f} {v['detail']:7.4f}" if "detail" in v else ""
            print(f"{name:<12} {row:<8} {v.get('num', ''):>5} {distances} {seen}")
    copies = report["memorisation"]
    print(f"memorisation: {100 * copies['share']:.1f} % of samples are closer to a training film than held-out films are "
          f"(95 %: {100 * copies['interval'][0]:.1f} to {100 * copies['interval'][1]:.1f} %; by chance "
          f"{100 * copies['expected']:.1f} %)")
    for name, (value, low, high) in report.get("auroc", {}).items():
        print(f"AUROC, trained on {name:<37} {value:.3f} ({low:.3f} to {high:.3f})")


def main(argv=None):
    args = experiment.parse_args(make_parser(), argv)
    procs = experiment.setup_processes(args)
    if procs.world_size > 1:
        fail("evaluate.py runs in one process")
    if bool(args.ckpt) == bool(args.samples_dir):
        fail("what is to be measured? Give either --ckpt=runs/ldm_.../ckpts/last.pt or --samples_dir=FOLDER")

    # --- samples, and the real films at their size ---
    vae, how = None, {}
    if args.ckpt:
        ldm = sample.prepare(args, procs)
        vae, args.img_size, class_names = ldm.vae, ldm.checkpoint["args"]["img_size"], ldm.checkpoint["class_names"]
        out = pathlib.Path(args.out_dir or pathlib.Path(args.ckpt).parent.parent)
        how = {"step": ldm.checkpoint["step"], **{k: getattr(args, k) for k in (
            "sampler", "num_sampling_steps", "guidance_scale", "guidance_interval")}}
    else:
        class_names = data.scan(args.data_root or data.phantom_root(args, procs), args.task, "train").class_names
        samples = read_samples(args.samples_dir, class_names, args.img_size)
        args.img_size = samples.rows.shape[-1]
        out = pathlib.Path(args.out_dir or args.samples_dir)
        if args.ae_ckpt_path:
            vae, _, _ = load_autoencoder(args.ae_ckpt_path, None, procs)
    real, train = data.open_images(args, procs, args.split), data.open_images(args, procs, "train")
    if not real.class_names == train.class_names == class_names:
        fail(f"the samples' classes are {', '.join(class_names)}, those of the data {', '.join(train.class_names)} "
             f"(train) and {', '.join(real.class_names)} ({args.split}): give the --task that belongs to them")
    experiment.make_folder(out)
    if args.ckpt:
        samples = draw_samples(ldm, args, procs)
    sets = {"samples": samples, "train": train, "real": real}
    labels = {name: torch.from_numpy(images.labels) for name, images in sets.items()}
    views = {name: in_batches(lambda x: shrink(x, CLASSIFIER_SIZE), images, procs) for name, images in sets.items()}

    # --- distributions, by class and overall ---
    judge = None
    if len(class_names) > 1:
        judge = real_classifier(views["train"], labels["train"], len(class_names), train.key, args, procs)
    network, features_name = feature_network(args.features, vae, judge, procs)
    pool = train.subset(as_many(train.labels, np.repeat(samples.labels, FLOOR_DRAWS), args.seed))
    rows = {"samples": samples, "train": pool, "real": real}
    features, levels = ({row: in_batches(function, images, procs) for row, images in rows.items()}
                        for function in (network, looks))
    if vae:  # what the autoencoder leaves of the real films, which is about the most that samples can have
        rows["decoded"] = real
        levels["decoded"] = in_batches(lambda x: looks(vae.decode(vae.encode(x).mean).clamp(-1, 1)), real, procs)
    classes = {row: images.labels for row, images in rows.items()}
    groups = {}
    for group in ["all", *(class_names[c] for c in np.unique(samples.labels))]:
        keep = {row: slice(None) if group == "all" else np.flatnonzero(of == class_names.index(group))
                for row, of in classes.items()}
        groups[group] = group_rows(*({row: values[row][keep[row]] for row in values}
                                     for values in (features, levels, classes)), args.seed)
    report = {"features": features_name, "split": args.split, "seed": args.seed, **how, "groups": groups}

    # --- copies of training films ---
    copies = metrics.memorisation(*(in_batches(small_pictures, sets[name], procs) for name in ("samples", "train", "real")))
    closest = copies.pop("ratio").argsort()[:10]
    pairs = copies.pop("nearest")[closest]
    report["memorisation"] = copies | {"pixels": PIXEL_SIZE}
    experiment.save_grid(out / "evaluation_pairs.png", [samples.images(closest.numpy()), train.images(pairs.numpy())],
                         ["the ten samples closest to a training film", "that training film"])

    # --- of use to a classifier? ---
    if judge and len(labels["samples"].unique()) > 1:
        report["auroc"] = usefulness({name: (views[name], labels[name]) for name in sets}, len(class_names), judge, args,
                                     procs)
    else:
        notice("one class only: no classifier to judge the samples by")
    found = verdicts(report)
    experiment.write_json(out / "evaluation.json", report | {"verdicts": [v._asdict() for v in found]})
    print_report(report)
    print(metrics.format_verdicts(found))
    print(f"written: {out / 'evaluation.json'}, {out / 'evaluation_pairs.png'}")


if __name__ == "__main__":
    main()
