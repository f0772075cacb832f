"""Names, settings and weights of our networks as diffusers has them, and back.

model.py has the layers of diffusers' AutoencoderKL and UNet2DModel, so only names differ:
`vae_names` and `unet_names` pair them for both directions. Nothing here imports diffusers.
"""
import pathlib

import torch

import model
from lib.files import fail, first_line, read_json

# Parts of a ResBlock and of an Attention, if diffusers names them otherwise.
RENAMED = {"emb": "time_emb_proj", "skip": "conv_shortcut", "norm": "group_norm",
           "proj": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")  # three layers there, one of ours
# Attention before diffusers 0.18; the files of stabilityai/sd-vae-ft-mse still have these names.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --- pairs of names -----------------------------------------------------------------------------


def block_names(layers, theirs):
    """[(our name, their name)] for layers [(our name, module)] in order. A block of diffusers ends
    with an up- or downsampling and numbers its resnets and attentions separately."""
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


def middle_names(ours, first, theirs):
    """The same for a middle block, whose three layers begin at index `first` of ours."""
    parts = ("resnets.0", "attentions.0", "resnets.1")
    return [(f"{ours}.{first + i}", f"{theirs}.{part}") for i, part in enumerate(parts)]


def vae_names(vae):
    """[(our name, their name)] of all layers with weights of a model.AutoencoderKL."""
    encoder = [(f"encoder.{i}", layer) for i, layer in enumerate(vae.encoder)]
    decoder = [(f"decoder.{i}", layer) for i, layer in enumerate(vae.decoder)]
    # Encoder: convolution, blocks, three layers of the middle block, norm, SiLU, convolution.
    names = [("encoder.0", "encoder.conv_in"),
             *block_names(encoder[1:-6], "encoder.down_blocks"),
             *middle_names("encoder", len(encoder) - 6, "encoder.mid_block"),
             (encoder[-3][0], "encoder.conv_norm_out"), (encoder[-1][0], "encoder.conv_out"),
             ("decoder.0", "decoder.conv_in"),
             *middle_names("decoder", 1, "decoder.mid_block"),
             *block_names(decoder[4:-3], "decoder.up_blocks"),
             (decoder[-3][0], "decoder.conv_norm_out"), (decoder[-1][0], "decoder.conv_out")]
    optional = ("quant_conv", "post_quant_conv", "linear_encoder", "linear_decoder")
    return names + [(name, name) for name in optional if f"{name}.weight" in vae.state_dict()]


def unet_names(unet):
    """[(our name, their name)] of all layers with weights of a model.UNet, without the embedding of
    augmentations, which is zero for samples."""
    def flat(blocks, name):
        return [(f"{name}.{i}.{j}", layer) for i, block in enumerate(blocks)
                for j, layer in enumerate(block)]

    return [("conv_in", "conv_in"), ("class_emb", "class_embedding"),
            ("time_mlp.0", "time_embedding.linear_1"), ("time_mlp.2", "time_embedding.linear_2"),
            *block_names(flat(unet.down, "down"), "down_blocks"),
            *middle_names("mid", 0, "mid_block"),
            *block_names(flat(unet.up, "up"), "up_blocks"),
            ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]


# --- weights ------------------------------------------------------------------------------------


def key_pairs(module, names):
    """Yield (our key, [their keys]) of all weights; ours concatenates theirs along dimension 0."""
    for ours, theirs in names:
        for key in module.get_submodule(ours).state_dict():
            part, _, rest = key.rpartition(".")
            parts = QKV if part == "qkv" else [RENAMED.get(part, part)]
            yield f"{ours}.{key}", [".".join(filter(None, (theirs, p, rest))) for p in parts]


def to_diffusers(module, names):
    """Weights {their key: tensor} of one of our networks."""
    own, state = module.state_dict(), {}
    for key, others in key_pairs(module, names):
        state.update(zip(others, own[key].chunk(len(others)), strict=True))
    return state


def from_diffusers(module, names, state):
    """Weights {our key: tensor} from {their key: tensor}. Raises KeyError if one is missing and
    ValueError if one is left over."""
    state = dict(state)
    own = {key: torch.cat([state.pop(other) for other in others])
           for key, others in key_pairs(module, names)}
    if state:
        raise ValueError(f"{min(state)} is not part of it")
    return own


# --- configurations ------------------------------------------------------------------------------


def block_types(size, channel_mults, attn_res, name):
    """Names of down blocks for a network that starts at `size` pixels: Attn in front of `name` if
    the level's size is in attn_res."""
    return [f"Attn{name}" if size >> level in attn_res else name
            for level in range(len(channel_mults))]


def up_types(down_types):
    """Names of the up blocks that mirror these down blocks."""
    return [name.replace("Down", "Up").replace("Encoder", "Decoder") for name in down_types[::-1]]


def unet_config(settings, latent_shape, num_classes):
    """Arguments of the UNet2DModel that equals our UNet with a dict of train_ldm.py's settings."""
    channels, size, _ = latent_shape
    base, mults = settings["ldm_base_ch"], settings["ldm_ch_mults"]
    down_types = block_types(size, mults, settings["ldm_attn_res"], "DownBlock2D")
    return {"sample_size": size, "in_channels": channels, "out_channels": channels,
            "block_out_channels": [base * mult for mult in mults],
            "down_block_types": down_types, "up_block_types": up_types(down_types),
            "layers_per_block": settings["ldm_num_res_blocks"],
            "attention_head_dim": model.head_dim(base), "norm_eps": 1e-6,
            "norm_num_groups": model.num_groups(base),
            "attn_norm_num_groups": model.num_groups(base),
            "resnet_time_scale_shift": "scale_shift", "num_class_embeds": num_classes + 1}


def vae_config(settings, latent_scale_factor):
    """Arguments of the AutoencoderKL that equals ours with a dict of train_vae.py's settings; with
    patch_size or linear_path, of exported_pipeline.CXRAutoencoder."""
    patch, base, mults = settings["patch_size"], settings["base_ch"], settings["ch_mults"]
    size = settings["img_size"] // patch
    down_types = block_types(size, mults, settings["attn_res"], "DownEncoderBlock2D")
    config = {"in_channels": patch**2, "out_channels": patch**2, "sample_size": size,
              "block_out_channels": [base * mult for mult in mults],
              "down_block_types": down_types, "up_block_types": up_types(down_types),
              "layers_per_block": settings["num_res_blocks"],
              "latent_channels": settings["z_channels"],
              "norm_num_groups": model.num_groups(base), "scaling_factor": latent_scale_factor,
              "use_quant_conv": settings["quant_conv"],
              "use_post_quant_conv": settings["quant_conv"]}
    if patch > 1 or settings["linear_path"]:
        config |= {"patch_size": patch, "linear_path": settings["linear_path"]}
    return config


# --- an autoencoder of diffusers ----------------------------------------------------------------

FIXED = {"act_fn": "silu", "mid_block_add_attention": True}  # what ours cannot have otherwise
DEFAULTS = {"norm_num_groups": 32, "use_quant_conv": True, "use_post_quant_conv": True,
            "patch_size": 1, "linear_path": False, **FIXED}  # of a config.json that lacks them


def vae_folder(path):
    """Folder of the diffusers autoencoder at `path`, or in vae/ of a pipeline there, else None."""
    for folder in (pathlib.Path(path), pathlib.Path(path, "vae")):
        if (folder / "config.json").is_file():
            return folder
    return None


def vae_settings(folder, img_size):
    """Settings of train_vae.py, {name: value}, for the shape of the autoencoder in a folder; exits
    with an error if model.AutoencoderKL cannot have it."""
    config = {**DEFAULTS, **read_json(folder / "config.json", "diffusers config")}
    try:
        widths, patch = config["block_out_channels"], config["patch_size"]
        attention = [img_size // patch >> level
                     for level, name in enumerate(config["down_block_types"])
                     if name.startswith("Attn")]
        settings = {"z_channels": config["latent_channels"], "base_ch": widths[0],
                    "ch_mults": tuple(width // widths[0] for width in widths),
                    "num_res_blocks": config["layers_per_block"], "attn_res": tuple(attention),
                    "patch_size": patch, "linear_path": config["linear_path"],
                    "quant_conv": config["use_quant_conv"]}
        if config["_class_name"] not in ("AutoencoderKL", "CXRAutoencoder"):
            fail(f"{folder} has _class_name={config['_class_name']}: give an AutoencoderKL")
        ours = {**vae_config({**settings, "img_size": img_size}, 1.0), **FIXED}
        if config["in_channels"] == 3:  # becomes 1 channel in vae_weights
            ours |= {"in_channels": 3, "out_channels": 3}
        del ours["sample_size"], ours["scaling_factor"]
        for name in ours:
            if config[name] != ours[name]:
                fail(f"{folder} has {name}={config[name]}, but our AutoencoderKL needs "
                     f"{ours[name]}: give another autoencoder")
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as e:
        fail(f"{folder}/config.json describes no AutoencoderKL ({type(e).__name__}: {e})")
    return settings


def read_weights(folder):
    """{their key: tensor} of the safetensors in a diffusers folder, with today's names."""
    path = folder / "diffusion_pytorch_model.safetensors"
    try:
        from safetensors.torch import load_file
        state = load_file(path)
    except ImportError:
        fail(f"{path} needs the safetensors package: pip install safetensors")
    except Exception as e:  # whatever a damaged file raises
        fail(f"cannot read {path} ({first_line(e)}): download it again, or save the "
             "model with diffusers' save_pretrained")
    for key in [key for key in state if ".attentions." in key]:
        prefix, name, leaf = key.rsplit(".", 2)
        state[f"{prefix}.{OLD_NAMES.get(name, name)}.{leaf}"] = state.pop(key)
    return {key: value.float() for key, value in state.items()}


def vae_weights(vae, folder):
    """Weights {our key: tensor} for a model.AutoencoderKL from a diffusers folder; exits with an
    error if they do not fit.

    An autoencoder of three channels becomes one of gray images: its first convolution sees them in
    all three, and its last one returns their mean.
    """
    state = read_weights(folder)
    try:
        if vae.patch_size == 1 and state["encoder.conv_in.weight"].shape[1] == 3:
            state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].sum(1, keepdim=True)
            for key in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
                state[key] = state[key].mean(0, keepdim=True)
        return from_diffusers(vae, vae_names(vae), state)
    except (KeyError, ValueError) as e:
        fail(f"the weights in {folder} do not fit its config.json: {e}")
