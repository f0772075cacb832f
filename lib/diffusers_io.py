"""Our networks in the terms of diffusers, and an autoencoder of diffusers in ours.

model.py has the layers of diffusers' AutoencoderKL and UNet2DModel, so that only names differ:
`vae_names` and `unet_names` pair them, and weights travel either way. Nothing here needs diffusers
itself.
"""
import pathlib

import torch

import experiment
import model
from experiment import fail

# Of the parts of a ResBlock and of an Attention; what is not here has one name.
RENAMED = {"emb": "time_emb_proj", "skip": "conv_shortcut", "norm": "group_norm",
           "proj": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")  # three layers there, one of ours
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --- pairs of names -----------------------------------------------------------------------------


def block_names(layers, theirs):
    """[(our name, their name)] of layers [(our name, module)] in order: a block there ends with an
    up- or down-sampling, and counts its resnets and attentions apart."""
    names, block = [], 0
    resnets = attentions = 0
    for ours, layer in layers:
        prefix = f"{theirs}.{block}"
        if isinstance(layer, model.ResBlock):
            names.append((ours, f"{prefix}.resnets.{resnets}"))
            resnets += 1
        elif isinstance(layer, model.Attention):
            names.append((ours, f"{prefix}.attentions.{attentions}"))
            attentions += 1
        else:
            sampler = "downsamplers" if isinstance(layer, model.Downsample) else "upsamplers"
            names.append((ours, f"{prefix}.{sampler}.0"))
            block, resnets, attentions = block + 1, 0, 0
    return names


def middle_names(layers, theirs):
    """The same of the middle block."""
    parts = ("resnets.0", "attentions.0", "resnets.1")
    return [(ours, f"{theirs}.{part}") for (ours, _), part in zip(layers, parts, strict=True)]


def vae_names(vae):
    """[(our name, their name)] of all layers with weights of a model.AutoencoderKL."""
    encoder = [(f"encoder.{i}", layer) for i, layer in enumerate(vae.encoder)]
    decoder = [(f"decoder.{i}", layer) for i, layer in enumerate(vae.decoder)]
    # Encoder: convolution, blocks, three layers of the middle block, norm, SiLU, convolution.
    names = [(encoder[0][0], "encoder.conv_in"),
             *block_names(encoder[1:-6], "encoder.down_blocks"),
             *middle_names(encoder[-6:-3], "encoder.mid_block"),
             (encoder[-3][0], "encoder.conv_norm_out"), (encoder[-1][0], "encoder.conv_out")]
    names += [(decoder[0][0], "decoder.conv_in"),
              *middle_names(decoder[1:4], "decoder.mid_block"),
              *block_names(decoder[4:-3], "decoder.up_blocks"),
              (decoder[-3][0], "decoder.conv_norm_out"), (decoder[-1][0], "decoder.conv_out")]
    optional = ("quant_conv", "post_quant_conv", "linear_encoder", "linear_decoder")
    return names + [(name, name) for name in optional if f"{name}.weight" in vae.state_dict()]


def unet_names(unet):
    """[(our name, their name)] of all layers with weights of a model.UNet, but for what tells it
    how an image was augmented: samples are drawn without."""
    def flat(blocks, name):
        return [(f"{name}.{i}.{j}", layer) for i, block in enumerate(blocks)
                for j, layer in enumerate(block)]

    middle = [(f"mid.{i}", layer) for i, layer in enumerate(unet.mid)]
    return [("conv_in", "conv_in"), ("class_emb", "class_embedding"),
            ("time_mlp.0", "time_embedding.linear_1"), ("time_mlp.2", "time_embedding.linear_2"),
            *block_names(flat(unet.down, "down"), "down_blocks"),
            *middle_names(middle, "mid_block"),
            *block_names(flat(unet.up, "up"), "up_blocks"),
            ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]


# --- weights ------------------------------------------------------------------------------------


def their_keys(module, names):
    """Yield (our key, [their keys]) of all weights; where they are several, ours holds them one
    below another."""
    for ours, theirs in names:
        for key in module.get_submodule(ours).state_dict():
            part, _, rest = key.rpartition(".")
            parts = QKV if part == "qkv" else [RENAMED.get(part, part)]
            yield f"{ours}.{key}", [".".join(filter(None, (theirs, p, rest))) for p in parts]


def to_diffusers(module, names):
    """Weights of a network of ours, {their key: tensor}."""
    own, state = module.state_dict(), {}
    for key, others in their_keys(module, names):
        state.update(zip(others, own[key].chunk(len(others)), strict=True))
    return state


def from_diffusers(module, names, state):
    """Weights {our key: tensor} for a network of ours; ValueError where `state`, {their key:
    tensor}, lacks some or holds more."""
    state, own = dict(state), {}
    for key, others in their_keys(module, names):
        missing = [other for other in others if other not in state]
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        own[key] = torch.cat([state.pop(other) for other in others])
    if state:
        raise ValueError(f"it holds {min(state)}, which AutoencoderKL has not")
    return own


# --- what diffusers makes a network from --------------------------------------------------------


def attention_kinds(size, levels, attn_res):
    """"Attn" or "" for each level of a network that starts at `size`: how names of blocks begin."""
    return ["Attn" if size >> level in attn_res else "" for level in range(levels)]


def unet_config(settings, latent_shape, num_classes):
    """Arguments of the UNet2DModel that is model.UNet of a dict of train_ldm.py's settings."""
    base = settings["ldm_base_ch"]
    kinds = attention_kinds(latent_shape[1], len(settings["ldm_ch_mults"]),
                            settings["ldm_attn_res"])
    return {"sample_size": latent_shape[1], "in_channels": latent_shape[0],
            "out_channels": latent_shape[0],
            "block_out_channels": [base * mult for mult in settings["ldm_ch_mults"]],
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
            "layers_per_block": settings["ldm_num_res_blocks"],
            "attention_head_dim": model.head_dim(base), "norm_eps": 1e-6,
            "norm_num_groups": model.num_groups(base),
            "attn_norm_num_groups": model.num_groups(base),
            "resnet_time_scale_shift": "scale_shift", "num_class_embeds": num_classes + 1}


def vae_config(settings, latent_scale_factor):
    """Arguments of the AutoencoderKL that is model.AutoencoderKL of a dict of train_vae.py's
    settings; with patch_size or linear_path, of exported_pipeline.CXRAutoencoder."""
    patch, base, quant_conv = (settings[k] for k in ("patch_size", "base_ch", "quant_conv"))
    size = settings["img_size"] // patch
    kinds = attention_kinds(size, len(settings["ch_mults"]), settings["attn_res"])
    config = {"in_channels": patch**2, "out_channels": patch**2, "sample_size": size,
              "block_out_channels": [base * mult for mult in settings["ch_mults"]],
              "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
              "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
              "layers_per_block": settings["num_res_blocks"],
              "latent_channels": settings["z_channels"],
              "norm_num_groups": model.num_groups(base), "scaling_factor": latent_scale_factor,
              "use_quant_conv": quant_conv, "use_post_quant_conv": quant_conv}
    if patch > 1 or settings["linear_path"]:
        config |= {"patch_size": patch, "linear_path": settings["linear_path"]}
    return config


# --- an autoencoder of diffusers ----------------------------------------------------------------


def vae_folder(path):
    """The folder of a diffusers autoencoder at `path`, or in the vae/ of a whole pipeline there;
    None where there is none."""
    for folder in (pathlib.Path(path), pathlib.Path(path, "vae")):
        if (folder / "config.json").is_file():
            return folder
    return None


def vae_settings(folder, img_size):
    """Settings of train_vae.py, {name: value}, for the shape of the autoencoder in a folder; ends
    the program where model.AutoencoderKL has no such shape."""
    config = experiment.read_json(folder / "config.json", "diffusers config")
    try:
        widths, kinds = config["block_out_channels"], config["down_block_types"]
        patch = config.get("patch_size", 1)  # of export.py
        quant_conv = config.get("use_quant_conv", True)
        unlike = {
            "_class_name": config["_class_name"] not in ("AutoencoderKL", "CXRAutoencoder"),
            "in_channels": config["in_channels"] not in (3, patch**2),
            "out_channels": config["out_channels"] != config["in_channels"],
            "block_out_channels": any(width % widths[0] for width in widths),
            "down_block_types": not {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"} >= {*kinds},
            "norm_num_groups": config.get("norm_num_groups", 32) != model.num_groups(widths[0]),
            "act_fn": config.get("act_fn", "silu") != "silu",
            "use_post_quant_conv": config.get("use_post_quant_conv", True) != quant_conv,
            "mid_block_add_attention": not config.get("mid_block_add_attention", True)}
        for name, bad in unlike.items():
            if bad:
                fail(f"{folder} has {name}={config.get(name)}, which our AutoencoderKL cannot be")
        attention = [img_size // patch >> level for level, kind in enumerate(kinds)
                     if kind.startswith("Attn")]
        return {"z_channels": config["latent_channels"], "base_ch": widths[0],
                "ch_mults": tuple(width // widths[0] for width in widths),
                "num_res_blocks": config["layers_per_block"], "attn_res": tuple(attention),
                "patch_size": patch, "linear_path": config.get("linear_path", False),
                "quant_conv": quant_conv}
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as e:
        fail(f"{folder}/config.json describes no AutoencoderKL ({type(e).__name__}: {e})")


def read_weights(folder):
    """{name: tensor} of the weights in a diffusers folder; no code in them is run."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        path = path.with_suffix(".bin")
    if not path.is_file():
        fail(f"no diffusion_pytorch_model.safetensors or .bin in {folder}")
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True)
        from safetensors.torch import load_file
        return load_file(path)
    except ImportError:
        fail(f"{path} needs the safetensors package: pip install safetensors")
    except Exception as e:  # whatever a damaged file raises
        fail(f"{path} is damaged or holds no weights ({experiment.first_line(e)})")


def vae_weights(vae, folder):
    """Weights {our key: tensor} for a model.AutoencoderKL from a diffusers folder.

    An autoencoder of three channels becomes one of grey images: its first convolution sees them in
    all three, and its last gives their mean. Ends the program where the weights do not fit.
    """
    state = {}
    for key, value in read_weights(folder).items():
        if ".attentions." in key:  # of diffusers before 0.18
            prefix, name, leaf = key.rsplit(".", 2)
            key = f"{prefix}.{OLD_NAMES.get(name, name)}.{leaf}"
        state[key] = value.float()
    try:
        if vae.patch_size == 1 and state["encoder.conv_in.weight"].shape[1] == 3:
            for key, mix in (("encoder.conv_in.weight", lambda w: w.sum(1, keepdim=True)),
                             ("decoder.conv_out.weight", lambda w: w.mean(0, keepdim=True)),
                             ("decoder.conv_out.bias", lambda w: w.mean(0, keepdim=True))):
                state[key] = mix(state[key])
        return from_diffusers(vae, vae_names(vae), state)
    except (KeyError, ValueError) as e:
        fail(f"the weights in {folder} do not fit the autoencoder's settings: {e}")
